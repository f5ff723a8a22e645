"""What CUDA's loss functions allocate beside a loss that is one number.

Each makes the losses of all elements and then their mean or sum. Some keep the memory of the
former as that of the latter: PyTorch only shrinks the shape of the result.

From `aten/src/ATen/native/BinaryOps.cpp` and `Loss.cpp`, and `aten/src/ATen/native/cuda/Loss.cu`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels.reductions import reduction_scratch
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.scratch import RESULT, Step, Steps

__all__ = ["LOSSES", "OUTPUTS", "loss_scratch"]

aten = torch.ops.aten

_NONE, _MEAN = 0, 1
_REDUCTION_AT = {
    aten.mse_loss.default: 2,
    aten.smooth_l1_loss.default: 2,
    aten.huber_loss.default: 2,
    aten.binary_cross_entropy.default: 3,
    aten.binary_cross_entropy_with_logits.default: 4,
}
"""By op: which argument says whether the losses are averaged, which they are by default."""

LOSSES = tuple(_REDUCTION_AT)
"""The ops that may take scratch."""


def loss_scratch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec) -> Steps:
    """Return what a loss function takes beside its result, in order.

    Args:
        func: one of `LOSSES`.
        args: its arguments.
        kwargs: its arguments by name, of which none counts.
        gpu: the card, for the scratch of the reduction.
    """
    if func is aten.binary_cross_entropy_with_logits.default:
        return _with_logits(args, gpu)
    reduction = _reduction(func, args)
    if reduction == _NONE:
        return ()
    losses = _losses(*args[:2])
    summed = _summed(losses, reduction, gpu)
    if func is aten.huber_loss.default:
        return [losses.nbytes, RESULT, *summed]
    if func is aten.binary_cross_entropy.default:
        return [RESULT, losses.element_size(), *summed]
    return [RESULT, losses.nbytes, *summed]


def _with_logits(args: Sequence[Any], gpu: GpuSpec) -> Steps:
    """Return the logarithms of the sigmoids, the weights of positive targets, and the losses."""
    logits, target = args[:2]
    positive = args[3] if len(args) > 3 else None
    reduction = _reduction(aten.binary_cross_entropy_with_logits.default, args)
    steps: list[Step] = [logits.nbytes]
    if positive is not None:
        steps += [positive.nbytes, _losses(positive, target).nbytes, ~1, ~2]
    if reduction == _NONE:
        return [*steps, RESULT]
    losses = _losses(target, target)
    return [*steps, losses.nbytes, RESULT, *_summed(losses, reduction, gpu)]


def _summed(losses: Tensor, reduction: int, gpu: GpuSpec) -> Steps:
    op = aten.mean.default if reduction == _MEAN else aten.sum.default
    return [step for step in reduction_scratch(op, (losses,), {}, gpu) if isinstance(step, int)]


def _losses(one: Tensor, other: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(one.shape, other.shape)
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.empty(shape, dtype=dtype, device="meta")


def _reduction(func: Any, args: Sequence[Any]) -> int:
    place = _REDUCTION_AT[func]
    return args[place] if len(args) > place else _MEAN


def _shrunk(mode: Any, func: Any, *args: Any) -> Any:
    """Make a loss in the memory of the losses of all elements."""
    if _reduction(func, args) == _NONE:
        return NotImplemented
    losses = _losses(*args[:2])
    return mode.part(mode.empty(tuple(losses.shape), losses.dtype, args[0]), (), 0)


OUTPUTS = {
    func: lambda mode, *args, func=func: _shrunk(mode, func, *args)
    for func in (
        aten.mse_loss.default,
        aten.smooth_l1_loss.default,
        aten.binary_cross_entropy.default,
    )
}
"""By op, what makes its result where that is not as large as its shape says."""
