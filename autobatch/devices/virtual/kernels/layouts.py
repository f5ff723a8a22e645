"""The layouts in which CUDA's kernels give results, where PyTorch's rules say others.

For ops that Python code stands for, the rules for tensors without data follow that code, and not
the kernel. Results of most kernels of single elements have the layout of their first argument
(`aten/src/ATen/TensorIterator.cpp`), which a sum has too; some are always contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels.convolutions import CONVOLUTION, CONVOLUTION_BACKWARD
from autobatch.devices.virtual.kernels.memory_formats import layout_of

__all__ = ["relaid"]

aten = torch.ops.aten

_AS_A_SUM_OF = {
    aten.softplus_backward.default: (0, 1),
    aten.elu_backward.default: (0, 5),
    aten.hardswish_backward.default: (0, 1),
    aten.hardtanh_backward.default: (0, 1),
    aten.hardsigmoid_backward.default: (0, 1),
    aten.logit_backward.default: (0, 1),
}
"""By op: the arguments whose layouts count."""

_FIRST_TENSOR = {CONVOLUTION: 0, CONVOLUTION_BACKWARD: 1}
_CONTIGUOUS = frozenset(
    op.default
    for op in (
        aten._log_softmax_backward_data,
        aten.native_group_norm_backward,
        aten.cumsum,
        aten.cumprod,
        aten.topk,
        *((aten._fused_rms_norm_backward,) if hasattr(aten, "_fused_rms_norm_backward") else ()),
    )
)


def relaid(func: Any, args: Sequence[Any], output: Any) -> Any:
    """Return the results of an op in the layout that the kernel gives them.

    >>> data = torch.empty(2, 8, 4, 4, device="meta").to(memory_format=torch.channels_last)
    >>> args = (data, torch.empty(16, 8, 1, 1, device="meta"), None, [1], [0], [1], False, [0], 1)
    >>> relaid(CONVOLUTION, args, torch.empty(2, 16, 4, 4, device="meta")).stride()
    (256, 1, 64, 16)
    """
    if func in _FIRST_TENSOR:
        first = _FIRST_TENSOR[func]
        layout = layout_of(*args[first : first + 2])
        return output if layout is torch.contiguous_format else _in(layout, output)
    if func in _CONTIGUOUS:
        return _in(torch.contiguous_format, output)
    if func in _AS_A_SUM_OF:
        one, other = (_without_data(args[place]) for place in _AS_A_SUM_OF[func])
        strides = torch.add(one, other).stride()
        if strides != output.stride():
            return output.new_empty_strided(output.shape, strides)
    return output


def _in(layout: torch.memory_format, output: Any) -> Any:
    """Return tensors of a layout; those of another number of dimensions stay as they are."""
    if isinstance(output, (list, tuple)):
        return type(output)(_in(layout, each) for each in output)
    if not isinstance(output, Tensor) or not output.dim():
        return output
    dims = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(layout, output.dim())
    return output.contiguous(memory_format=layout) if output.dim() == dims else output


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), device="meta")
