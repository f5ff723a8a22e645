"""Which objects a walk shares instead of copying them.

Invariant: nothing is called but `isinstance`, and what a file says of itself; no property of the
user's is read.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from autobatch.support.torch_private import OpOverload, OpOverloadPacket
from autobatch.workload.files import is_closed

__all__ = ["files_read_by", "holds_tensors", "is_kept"]

_KEPT_ROOTS = frozenset(
    """
    _ctypes _io _multiprocessing _queue _socket _sqlite3 _ssl _thread aim asyncio clearml comet_ml
    concurrent contextvars ctypes datasets io logging mlflow mmap multiprocessing pyarrow queue rich
    select socket sqlite3 ssl subprocess tempfile tensorboard tensorboardX threading tokenizers tqdm
    triton wandb
    """.split()
)
"""Top-level modules whose objects stand for something outside: threads, files, logs, tables."""

_KEPT: tuple[type, ...] = (
    DataLoader,
    Dataset,
    Sampler,
    GeneratorType,
    torch.cuda.Stream,
    torch.cuda.Event,
    OpOverload,  # lists and policies name ops, and ops hold one another
    OpOverloadPacket,
    *(
        (torch.distributed.ProcessGroup, torch.distributed.distributed_c10d.Store)
        if torch.distributed.is_available()
        else ()
    ),
)


def is_kept(value: Any) -> bool:
    """Whether an object is shared instead of copied.

    So are loaders and data sets, and what stands for files, threads or loggers.
    """
    kind = type(value)
    if isinstance(value, (nn.Module, Tensor)):
        return False
    root = (kind.__module__ or "").partition(".")[0]
    return isinstance(value, _KEPT) or root in _KEPT_ROOTS


def files_read_by(value: Any) -> Iterator[io.IOBase]:
    """Yield an object that is a file, or files that it refers to; none that is written on disk."""
    for file in [value] if isinstance(value, io.IOBase) else gc.get_referents(value):
        in_memory = isinstance(file, (io.BytesIO, io.StringIO))
        is_open = isinstance(file, io.IOBase) and not is_closed(file)
        if is_open and (in_memory or not file.writable()):
            yield file


def holds_tensors(value: Any) -> bool:
    """Whether an object that has no attributes to look at refers to a tensor or a module."""
    found = gc.get_referents(value)
    found += [part for held in found if type(held) in (dict, list, tuple) for part in _parts(held)]
    return any(isinstance(part, (Tensor, nn.Module)) for part in found)


def _parts(held: Any) -> list[Any]:
    return list(held.values() if type(held) is dict else held)[:1000]
