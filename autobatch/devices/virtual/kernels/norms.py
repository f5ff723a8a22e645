"""What CUDA's normalizations allocate beside their results.

They copy inputs that are not contiguous, a group norm after its results and a layer norm before
them, but for the gradient that comes in. From `layer_norm_kernel.cu` and `group_norm_kernel.cu` in
`aten/src/ATen/native/cuda`, and `layer_norm.cpp` and `group_norm.cpp` in `aten/src/ATen/native`.
cuDNN's batch norm copies the gradient to the layout of the data (`cudnn/BatchNorm.cpp` there).

Gradients of the weights of a layer norm over more than 65,536 rows are added up in two steps: rows
are summed in groups of 32, at most 2**20 numbers in all, and then the groups
(`LayerNormBackwardKernelImplInternal`; the limit on the numbers was seen in PyTorch's CUDA code on
a simulated runtime).

A group norm with weights keeps a scale and a shift for every channel of every sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels.memory_formats import layout_of
from autobatch.devices.virtual.kernels.reductions import sum_over_rows
from autobatch.devices.virtual.kernels.sizes import ceil_div, copies_of
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.scratch import RESULTS, Step, Steps

__all__ = ["NORMS", "norm_scratch", "runs_on_cudnn"]

aten = torch.ops.aten

_MANY_ROWS = 2**16
_GROUP = 32
_MOST_NUMBERS = 2**20
_FLOAT = 4
_NAME = "norm scratch"


def norm_scratch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec) -> Steps:
    """Return what a normalization takes beside its results.

    Args:
        func: one of `NORMS`.
        args: its arguments.
        kwargs: its arguments by name.
        gpu: the card, whose multiprocessors count.
    """
    return _RULES[func](args, gpu)


def _forward(args: Sequence[Any], gpu: GpuSpec) -> Steps:
    return _named(copies_of(args[0]))


def _layer_backward(args: Sequence[Any], gpu: GpuSpec) -> Steps:
    gradient, data, shape, _, _, weight, bias, wanted = args
    parts = [part for part, wants in ((weight, wanted[1]), (bias, wanted[2])) if wants]
    return _backward(gradient, data, shape, parts, gpu)


def _rms_backward(args: Sequence[Any], gpu: GpuSpec) -> Steps:
    gradient, data, shape, _, weight, wanted = args
    return _backward(gradient, data, shape, [weight] if wanted[1] else [], gpu)


def _backward(
    gradient: Tensor, data: Tensor, shape: Sequence[int], parts: Sequence[Any], gpu: GpuSpec
) -> Steps:
    parts = [part for part in parts if part is not None]
    before, after = copies_of(data), copies_of(gradient)
    steps: list[Step] = [*_named(before), RESULTS, *_named(after)]
    width = math.prod(shape)
    rows = data.numel() // max(width, 1)
    if rows <= _MANY_ROWS or width // _GROUP >= gpu.multiprocessors // 2 or not parts:
        return steps
    groups = min(ceil_div(rows, _GROUP), _MOST_NUMBERS // width)
    element = parts[0].element_size()
    steps += [_NAME, *[groups * width * element] * len(parts)]
    taken = len(before) + len(after) + len(parts)
    for part in parts:
        sums = [width * element, *sum_over_rows(groups, width, part.dtype, gpu)]
        steps += [*sums, *(~(taken + place) for place in reversed(range(len(sums))))]
        taken += len(sums)
    return steps


def _group(args: Sequence[Any], gpu: GpuSpec) -> Steps:
    data, weight, bias, samples, channels = args[:5]
    copies = _named(copies_of(data))
    if weight is None and bias is None:
        return [RESULTS, *copies] if copies else ()
    return [RESULTS, *copies, _NAME, *[samples * channels * _FLOAT] * 2]


def _group_backward(args: Sequence[Any], gpu: GpuSpec) -> Steps:
    gradient, data, _, _, weight, samples, channels, _, groups = args[:9]
    by_channel, by_group = samples * channels * _FLOAT, samples * groups * _FLOAT
    sums = [by_channel, by_channel, by_group, by_group, *[by_channel] * (weight is not None)]
    return [*_named(copies_of(gradient, data)), RESULTS, _NAME, *sums]


def runs_on_cudnn(data: Tensor, weight: Tensor | None) -> bool:
    """Whether a batch norm runs on cuDNN (`_select_batch_norm_backend` in `Normalization.cpp`)."""
    return weight is not None and data.dim() > 2 and data.dtype is not torch.bfloat16


def _batch_backward(args: Sequence[Any], gpu: GpuSpec) -> Steps:
    """Return cuDNN's copy of the gradient; PyTorch's own kernel reads any layout."""
    gradient, data, weight = args[:3]
    is_dense = gradient.is_contiguous(memory_format=layout_of(data))
    return () if is_dense or not runs_on_cudnn(data, weight) else _named([gradient.nbytes])


def _named(copies: Sequence[int]) -> list[Step]:
    return ["contiguous", *copies] if copies else []


def _known(name: str) -> Any:
    """Return an op that not every version has."""
    return getattr(getattr(aten, name, None), "default", None)


_RULES = {
    op: rule
    for op, rule in (
        (aten.native_layer_norm.default, _forward),
        (aten.native_layer_norm_backward.default, _layer_backward),
        (_known("_fused_rms_norm"), _forward),
        (_known("_fused_rms_norm_backward"), _rms_backward),
        (aten.native_batch_norm_backward.default, _batch_backward),
        (aten.native_group_norm.default, _group),
        (aten.native_group_norm_backward.default, _group_backward),
    )
    if op is not None
}

NORMS = tuple(_RULES)
"""The ops that may take scratch."""
