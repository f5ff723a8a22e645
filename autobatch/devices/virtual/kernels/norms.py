"""What CUDA's normalizations allocate beside their results.

Gradients of the weights of a layer norm over more than 65,536 rows are added up in two steps: rows
are summed in groups of 32, at most 2**20 numbers in all, and then the groups. From
`LayerNormBackwardKernelImplInternal` in `aten/src/ATen/native/cuda/layer_norm_kernel.cu`, whose
limit on the numbers was seen in PyTorch's CUDA code on a simulated runtime.

A group norm keeps a scale and a shift for every channel of every sample
(`aten/src/ATen/native/cuda/group_norm_kernel.cu`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from autobatch.devices.virtual.kernels.reductions import sum_over_rows
from autobatch.devices.virtual.scratch import RESULTS, Step, Steps
from autobatch.gpus.catalogue import GpuSpec

__all__ = ["NORMS", "norm_scratch"]

aten = torch.ops.aten

_MANY_ROWS = 2**16
_GROUP = 32
_MOST_NUMBERS = 2**20
_FLOAT = 4


def norm_scratch(func: Any, args: Sequence[Any], gpu: GpuSpec, taken: int = 0) -> Steps:
    """Return what a normalization takes beside its results.

    Args:
        func: one of `NORMS`.
        args: its arguments.
        gpu: the card, whose multiprocessors count.
        taken: pieces of scratch that the op has taken before.
    """
    if func is aten.native_layer_norm_backward.default:
        _, data, shape, _, _, weight, bias, wanted = args
        parts = [part for part, wants in ((weight, wanted[1]), (bias, wanted[2])) if wants]
    elif func is _RMS_BACKWARD:
        _, data, shape, _, weight, wanted = args
        parts = [weight] if wanted[1] else []
    else:
        data, samples, channels = args[0], args[3], args[4]
        return [RESULTS, *[samples * channels * _FLOAT] * 2]
    parts = [part for part in parts if part is not None]
    width = math.prod(shape)
    rows = data.numel() // max(width, 1)
    if rows <= _MANY_ROWS or width // _GROUP >= gpu.multiprocessors // 2 or not parts:
        return ()
    groups = min(-(-rows // _GROUP), _MOST_NUMBERS // width)
    element = parts[0].element_size()
    steps: list[Step] = [RESULTS, *[groups * width * element] * len(parts)]
    taken += len(parts)
    for part in parts:
        sums = [width * element, *sum_over_rows(groups, width, part.dtype, gpu)]
        steps += [*sums, *(~(taken + place) for place in reversed(range(len(sums))))]
        taken += len(sums)
    return steps


_RMS_BACKWARD = getattr(getattr(aten, "_fused_rms_norm_backward", None), "default", None)

NORMS = tuple(
    op
    for op in (
        aten.native_layer_norm_backward.default,
        _RMS_BACKWARD,
        aten.native_group_norm.default,
    )
    if op is not None
)
"""The ops that may take scratch."""
