"""The order in which CUDA's kernels allocate their results, where it is not that of the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from autobatch.devices.virtual.kernels.cells import ORDERS
from autobatch.devices.virtual.kernels.convolutions import (
    CONVOLUTION_BACKWARD,
    runs_without_cudnn,
)
from autobatch.support.torch_private import torch_version

__all__ = ["order_of"]

aten = torch.ops.aten


def _of_efficient_attention(args: Sequence[Any]) -> Sequence[int]:
    """Leave the seeds of dropout out, which are on the CPU; without dropout they are not.

    PyTorch 2.12 and older versions have none without dropout.
    """
    has_seeds = len(args) > 5 and args[5]
    return (0, 1) if has_seeds or torch_version() < _UNUSED_SEEDS_SINCE else (2, 3, 0, 1)


_UNUSED_SEEDS_SINCE = (2, 13)


def _of_convolution_backward(args: Sequence[Any]) -> Sequence[int] | None:
    """Make the weight's gradient first where PyTorch's own kernel does.

    From `conv_depthwise2d_backward_cuda_out` in `ATen/native/cuda/DepthwiseConv2d.cu`.
    """
    return (1, 0, 2) if runs_without_cudnn(*args[1:3], *args[4:10]) else None


_ORDERS: Mapping[Any, Sequence[int] | Callable[[Sequence[Any]], Sequence[int] | None]] = {
    **ORDERS,
    CONVOLUTION_BACKWARD: _of_convolution_backward,
    aten.native_dropout.default: (1, 0),  # `dropout_cuda` in `ATen/native/cuda/Dropout.cu`
    aten._scaled_dot_product_cudnn_attention.default: (6, 7, 0, 1),
    aten._scaled_dot_product_flash_attention.default: (0, 1, 6, 7),
    aten._scaled_dot_product_efficient_attention.default: _of_efficient_attention,
}
"""By op: places of its results, the one that is allocated first at the beginning.

Attention: `ATen/native/transformers/cuda/attention.cu`; its other results take no memory there.
"""


def order_of(func: Any, args: Sequence[Any]) -> Sequence[int] | None:
    """Return the places of an op's results in the order of allocation; None where it is theirs."""
    order = _ORDERS.get(func)
    return order(args) if callable(order) else order
