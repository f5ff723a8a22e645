"""Which memory format the strides of a tensor tell of."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["layout_of"]


def layout_of(*tensors: Tensor) -> torch.memory_format:
    """Return NHWC or NDHWC where the strides of one of the tensors tell of it.

    From `suggest_memory_format` in `c10/core/TensorImpl.h` and what it calls: slices of a tensor in
    NHWC are in NHWC, and where dimensions of size 1 leave it open, a tensor is not.

    >>> layout_of(torch.empty(2, 4, 5, 3).permute(0, 3, 1, 2)[..., 1:])
    torch.channels_last
    """
    if any(map(_is_channels_last, tensors)):
        return {4: torch.channels_last, 5: torch.channels_last_3d}[tensors[0].dim()]
    return torch.contiguous_format


def _is_channels_last(tensor: Tensor) -> bool:
    shape, strides = tensor.shape, tensor.stride()
    if len(shape) not in (4, 5) or not strides[1]:
        return False
    least = 0
    for place in (1, *range(len(shape) - 1, 1, -1), 0):
        size, stride = shape[place], strides[place]
        if not size or stride < least or (place == 0 and least == strides[1]):
            return False
        least = stride * size
    return True
