"""Shapes of normalisations, as CUDA's kernels make them and PyTorch's own rules do not.

Sizes as CUDA's kernels return them (`aten/src/ATen/native/cuda/Normalization.cu`): statistics of
half-precision inputs are fp32, and there are none in evaluation mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["batch_norm", "batch_norm_backward", "layer_norm_backward"]


def batch_norm(
    mode: Any,
    data: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Any, Any, Any]:
    """Make what `native_batch_norm` returns: output, saved mean, saved inverse deviation."""
    half = data.dtype in (torch.float16, torch.bfloat16)
    statistics = (data.shape[1] if training else 0,), torch.float32 if half else data.dtype, data
    return mode.empty_like(data), mode.empty(*statistics), mode.empty(*statistics)


def batch_norm_backward(
    mode: Any, gradient: Tensor, data: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Any, Any, Any]:
    """Make what `native_batch_norm_backward` returns; its last argument masks the outputs."""
    channels, wants = (data.shape[1],), rest[-1]
    dtype = data.dtype if weight is None else weight.dtype
    return (
        mode.empty_like(data) if wants[0] else None,
        mode.empty(channels, dtype, data) if wants[1] else None,
        mode.empty(channels, dtype, data) if wants[2] else None,
    )


def layer_norm_backward(
    mode: Any,
    gradient: Tensor,
    data: Tensor,
    normalized_shape: Any,
    mean: Tensor,
    inverse_deviation: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wants: Any,
) -> tuple[Any, ...]:
    """Make what `native_layer_norm_backward` returns: contiguous, whatever the input was."""
    made = zip((data, weight, bias), wants, strict=True)
    return tuple(
        mode.empty(tuple(tensor.shape), tensor.dtype, tensor)
        if wanted and tensor is not None
        else None
        for tensor, wanted in made
    )
