"""Out of GPU memory as a value.

Invariant: this is the only place that recognises it, and nothing is cleaned up while the error is
alive: its traceback owns the tensors of every frame that it passed.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

__all__ = ["Shortage", "attempt", "let_go", "shortage_in"]

T = TypeVar("T")

LEGACY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-cont",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "unable to find an engine to execute this computation",
)
"""What libraries say in a plain RuntimeError; cuDNN finds no engine whose workspace fits."""


class Shortage(str):
    """What could not be allocated, in one line."""


def attempt(work: Callable[[], T]) -> T | Shortage:
    """Return what `work` returns, or the shortage of GPU memory that ended it.

    When this returns, the error and everything that its traceback held are gone.
    """
    try:
        return work()
    except Exception as error:
        found = shortage_in(error)
        if found is None:
            raise
        let_go(error)
    return found


def shortage_in(error: BaseException) -> Shortage | None:
    """Return the shortage of GPU memory behind an error, or None where it is another error."""
    for link in _chain(error):
        message = " ".join(str(link).split())
        if isinstance(link, torch.OutOfMemoryError) or (
            isinstance(link, RuntimeError) and any(known in message for known in LEGACY)
        ):
            return Shortage(message.partition(". GPU ")[0][:200])
    return None


def let_go(error: BaseException) -> None:
    """Drop what an error holds: the local variables of its finished frames, and what lacks a name.

    Its traceback still prints.
    """
    for link in _chain(error, everything=True):
        traceback.clear_frames(link.__traceback__)
        if isinstance(link, AttributeError):
            link.obj = None  # the module or tensor that lacks the attribute


def _chain(error: BaseException | None, *, everything: bool = False) -> Iterator[BaseException]:
    """Yield an error and those that it comes from.

    An error raised while another was handled comes from that if PyTorch raised it, as in cleaning
    up. Raised in code of the user's, who handles a shortage himself, it is an error of its own.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        context = error.__context__ if everything or _is_of_torch(error) else None
        error = error.__cause__ or context


def _is_of_torch(error: BaseException) -> bool:
    """Whether code of PyTorch's raised a plain RuntimeError."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    return type(error) is RuntimeError and module.partition(".")[0] == "torch"
