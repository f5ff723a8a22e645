"""Ops that CUDA runs as one kernel, and PyTorch takes apart on a device it knows nothing of.

They have a kernel for CUDA beside one made of other ops (`CompositeImplicitAutograd`). Where a
device has no kernel of its own the second one runs, and its intermediate results would be in the
account: seven tensors for one backward of SiLU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["FUSED", "log_sigmoid", "register"]

FUSED = ("silu_backward", "silu_backward.grad_input", "mish_backward", "_fused_rms_norm")

_libraries: list[Any] = []  # a Library unregisters its kernels when it is collected


def register() -> None:
    """Tell the dispatcher that our device has these kernels; once per process."""
    kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")
    _libraries.append(kernels)
    for name in FUSED:
        if hasattr(torch.ops.aten, name.partition(".")[0]):  # not in every version
            kernels.impl(name, _never)


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("fake tensors are answered before any kernel runs")


def log_sigmoid(mode: Any, data: Tensor) -> tuple[Any, Any]:
    """Make what `log_sigmoid_forward` returns: CUDA's kernel leaves the CPU's buffer empty."""
    return mode.empty_like(data), mode.empty((0,), data.dtype, data)
