"""Functions that a step compiles for itself, as torchao's optimizers do for each parameter.

They are simulated through their eager originals, whose ops make a tensor each. Compiled, several
ops are one kernel, and what lies between them stays in registers. How much of it does is the
compiler's choice, so nothing is left out except where it was seen: Inductor, run over PyTorch's
CUDA code on a simulated runtime, made of the update of torchao's 8-bit optimizers kernels that
allocate nothing. Those of its 4-bit and float8 ones do allocate; they keep the eager account, which
is larger.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from autobatch.devices.virtual.recorder import StorageRecorder
from autobatch.support.patching import patched

__all__ = ["compiled_functions_fused"]

_IN_REGISTERS = frozenset(("OptimState8bit",))
"""Kinds of states whose compiled update allocates nothing."""

_LIBRARIES = re.compile(r"mm\b|addm|convolution|sort|topk|workspace")
"""Ops whose results are memory also there: libraries' kernels make them."""


@contextlib.contextmanager
def compiled_functions_fused(recorder: StorageRecorder) -> Iterator[None]:
    """Tell a recorder when a function runs that was compiled in here and allocates nothing."""
    original = torch.compile

    def compiled(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compiled, **options)
        made = original(model, **options)
        return made if isinstance(model, nn.Module) else _told(model, made, recorder)

    with patched(torch, compile=compiled):
        yield


def _told(
    function: Callable[..., Any], made: Callable[..., Any], recorder: StorageRecorder
) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        kinds = {_kind(value) for value in args}
        if torch.is_grad_enabled() or not kinds & _IN_REGISTERS:
            return made(*args, **kwargs)
        before = recorder.extent()
        result = made(*args, **kwargs)
        recorder.in_registers(before, _LIBRARIES)
        return result

    return run


def _kind(value: Any) -> str:
    """Return the class of a tensor, or of the part of it that a rank holds."""
    return type(getattr(value, "_local_tensor", value)).__name__
