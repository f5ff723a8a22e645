"""Results whose layouts follow from those of the arguments by a plain rule.

FakeTensorMode finds them too, but takes ops apart into many others for it, each time that a shape
is new. The rules here are for dense tensors alone, and leave everything else to it.

Invariant: where a rule answers, it answers as FakeTensorMode and `kernels/layouts.py` do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels.convolutions import CONVOLUTION, CONVOLUTION_BACKWARD
from autobatch.devices.virtual.kernels.memory_formats import layout_of

__all__ = ["Recipe", "plain_recipe"]

Recipe = tuple[Any, ...]
"""How to make one output without running its op.

("same", i) is tensor i of the arguments, ("view", i, shape, stride, offset, dtype) aliases its
storage, ("new", shape, stride, dtype) owns a new storage, ("host", shape, stride, dtype) is one in
host memory, ("list", kind, recipes) holds several, ("value", v) is a plain Python value.
"""

_Rule = Callable[[Sequence[Any], Sequence[Tensor]], "Recipe | None"]

aten = torch.ops.aten


def plain_recipe(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]
) -> Recipe | None:
    """Return how to make the output of a call, or None where no rule here says it.

    `tensors` are those among the arguments, in order.

    >>> data = torch.empty(2, 3, device="meta")
    >>> plain_recipe(torch.ops.aten.gelu.default, (data,), {}, (data,))
    ('new', (2, 3), (3, 1), torch.float32)
    """
    rule = _RULES.get(func)
    if rule is None or not tensors or not all(t.is_floating_point() for t in tensors):
        return None
    if any(value is not _USUAL.get(name, value) for name, value in kwargs.items()):
        return None
    if kwargs.keys() - _USUAL.keys():
        return None
    return rule(args, tensors)


def _alike(args: Sequence[Any], tensors: Sequence[Tensor]) -> Recipe | None:
    """Make the result of a kernel of single elements on tensors of one layout and dtype."""
    first = tensors[0]
    shape, stride, dtype = tuple(first.shape), first.stride(), first.dtype
    if not _is_plain(shape, stride):
        return None
    for other in tensors[1:]:
        if tuple(other.shape) != shape or other.stride() != stride or other.dtype != dtype:
            return None
    return ("new", shape, stride, dtype)


def _in_place(args: Sequence[Any], tensors: Sequence[Tensor]) -> Recipe | None:
    return None if _alike(args, tensors) is None else ("same", 0)


def _each_alike(args: Sequence[Any], tensors: Sequence[Tensor]) -> Recipe | None:
    made = [_alike(args, (tensor,)) for tensor in tensors]
    return None if None in made else ("list", list, made)


def _convolved(args: Sequence[Any], tensors: Sequence[Tensor]) -> Recipe | None:
    data, weight, _, strides, padding, dilation, is_transposed, _, _ = args
    if is_transposed or not _are_rows(data, weight):
        return None
    spatial = zip(data.shape[2:], weight.shape[2:], strides, padding, dilation, strict=False)
    sizes = [
        (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, spread in spatial
    ]
    is_usual = len(strides) == len(padding) == len(dilation) == data.dim() - 2
    if not is_usual or min(sizes) < 1:
        return None
    return _contiguous((data.shape[0], weight.shape[0], *sizes), data.dtype)


def _convolved_backward(args: Sequence[Any], tensors: Sequence[Tensor]) -> Recipe | None:
    gradient, data, weight, bias_sizes, *_, is_transposed, _, _, wanted = args
    if is_transposed or not _are_rows(data, weight) or gradient.dtype != data.dtype:
        return None
    if wanted[2] and not bias_sizes:
        return None
    shapes = (tuple(data.shape), tuple(weight.shape), tuple(bias_sizes or ()))
    made = [
        _contiguous(shape, data.dtype) if is_wanted else ("value", None)
        for shape, is_wanted in zip(shapes, wanted, strict=True)
    ]
    return ("list", tuple, made)


def _are_rows(data: Tensor, weight: Tensor) -> bool:
    """Whether data and weight of a convolution are dense, in NCHW, and of one dtype."""
    return (
        data.dtype == weight.dtype
        and data.dim() == weight.dim()
        and all(
            0 not in each.shape and each.stride() == _row_strides(tuple(each.shape))
            for each in (data, weight)
        )
        and layout_of(data, weight) is torch.contiguous_format
    )


def _normalized(args: Sequence[Any], tensors: Sequence[Tensor]) -> Recipe | None:
    data, dims = args[0], len(args[1])
    shape = tuple(data.shape)
    if data.dtype == torch.float64 or 0 in shape or data.stride() != _row_strides(shape):
        return None
    statistics = _contiguous((*shape[: len(shape) - dims], *[1] * dims), torch.float32)
    return ("list", tuple, [_contiguous(shape, data.dtype), statistics, statistics])


def _normalized_by_mean_square(args: Sequence[Any], tensors: Sequence[Tensor]) -> Recipe | None:
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        return None
    made = _normalized(args, tensors)
    return None if made is None else ("list", tuple, made[2][:2])


def _contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Recipe:
    return ("new", shape, _row_strides(shape), dtype)


def _is_plain(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a tensor is dense, in NCHW or NHWC, and no other layout could be read from it."""
    if 0 in shape:
        return False
    if stride == _row_strides(shape):
        return True
    if len(shape) != 4 or 1 in shape:
        return False
    _, channels, rows, columns = shape
    return stride == (rows * columns * channels, 1, columns * channels, channels)


@functools.lru_cache(4096)
def _row_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor without empty dimensions.

    >>> _row_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


_OF_ELEMENTS = """
    add.Tensor sub.Tensor mul.Tensor div.Tensor
    abs.default cos.default exp.default log.default neg.default rsqrt.default sin.default
    sqrt.default elu.default elu_backward.default gelu.default gelu_backward.default
    hardsigmoid.default hardsigmoid_backward.default hardswish.default hardswish_backward.default
    hardtanh.default hardtanh_backward.default leaky_relu.default leaky_relu_backward.default
    mish.default mish_backward.default relu.default sigmoid.default sigmoid_backward.default
    silu.default silu_backward.default softplus.default softplus_backward.default tanh.default
    tanh_backward.default threshold_backward.default
"""

_IN_PLACE = """
    add_.Tensor mul_.Tensor elu_.default hardswish_.default hardtanh_.default leaky_relu_.default
    relu_.default sigmoid_.default silu_.default tanh_.default
"""

_USUAL = {
    "alpha": 1,
    "approximate": "none",
    "memory_format": torch.preserve_format,
    "pin_memory": False,
}
"""Named arguments that change nothing about a layout, with the values that a rule here knows."""

_RULES: dict[Any, _Rule] = {
    **{
        getattr(getattr(aten, name), overload): _alike
        for name, overload in (op.split(".") for op in _OF_ELEMENTS.split())
    },
    **{
        getattr(getattr(aten, name), overload): _in_place
        for name, overload in (op.split(".") for op in _IN_PLACE.split())
    },
    aten.ones_like.default: _alike,
    aten.zeros_like.default: _alike,
    aten._foreach_sqrt.default: _each_alike,
    CONVOLUTION: _convolved,
    CONVOLUTION_BACKWARD: _convolved_backward,
    aten.native_layer_norm.default: _normalized,
}
if hasattr(aten, "_fused_rms_norm"):  # not in every version
    _RULES[aten._fused_rms_norm.default] = _normalized_by_mean_square
