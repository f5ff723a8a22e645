"""Wrappers around a user's module: those of compilers and of data parallelism.

Invariant: a wrapper is read, never changed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["is_compiled", "is_data_parallel", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module below `torch.compile`, DataParallel and DistributedDataParallel."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif is_data_parallel(inner) or isinstance(inner, nn.DataParallel):
            inner = inner.module
        else:
            return inner  # type: ignore[no-any-return]


def is_data_parallel(model: nn.Module) -> bool:
    """Return whether a module is a DistributedDataParallel wrapper."""
    return hasattr(model, "gradient_as_bucket_view") and isinstance(model.module, nn.Module)


def is_compiled(model: nn.Module) -> bool:
    """Return whether a module, or any module in it, is compiled by `torch.compile`."""
    return any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module in model.modules()
    )
