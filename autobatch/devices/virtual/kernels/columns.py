"""What CUDA's kernels of `unfold` and `fold` allocate: columns of patches of images.

Both make a result as large as their input first, and then resize it: it keeps that memory where it
is large enough (`Im2Col.cu` and `Col2Im.cu` in `aten/src/ATen/native/cuda`). So the gradient of an
image has the memory of its columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels.sizes import copies_of
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.scratch import RESULT, Steps

__all__ = ["COLUMNS", "OUTPUTS", "column_scratch"]

IM2COL, COL2IM = torch.ops.aten.im2col.default, torch.ops.aten.col2im.default

COLUMNS = (IM2COL, COL2IM)
"""The ops that may take scratch."""


def column_scratch(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec
) -> Steps:
    """Return the first result, where it is too small, and the copy of an input with gaps.

    Args:
        func: one of `COLUMNS`.
        args: its arguments.
        kwargs: its arguments by name, of which none counts.
        gpu: the card; none of these depends on it.
    """
    data: Tensor = args[0]
    copies = copies_of(data)
    if math.prod(_shape(func, args)) > data.numel():
        return [data.nbytes, *copies, RESULT]
    return [RESULT, *copies]


def _shape(func: Any, args: Sequence[Any]) -> tuple[int, ...]:
    data: Tensor = args[0]
    if func is COL2IM:
        size, kernel = args[1:3]
        return (*data.shape[:-2], data.shape[-2] // math.prod(kernel), *size)
    kernel, dilation, padding, stride = args[1:5]
    sides = zip(data.shape[-2:], kernel, dilation, padding, stride, strict=True)
    places = math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in sides)
    return (*data.shape[:-3], data.shape[-3] * math.prod(kernel), places)


def _resized(mode: Any, func: Any, *args: Any) -> Any:
    """Make a result in memory as large as the input, where that is enough."""
    data, shape = args[0], _shape(func, args)
    if math.prod(shape) >= data.numel():
        return NotImplemented
    return mode.part(mode.empty(tuple(data.shape), data.dtype, data), shape, 0)


OUTPUTS = {
    IM2COL: lambda mode, *args: _resized(mode, IM2COL, *args),
    COL2IM: lambda mode, *args: _resized(mode, COL2IM, *args),
}
"""By op, what makes its result where that has more memory than its shape says."""
