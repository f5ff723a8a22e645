"""How outputs are made again without running their ops.

A call is known by its key: the layouts of its tensors, and its other arguments. A recipe (as in
`results.py`) says what its output is, given the tensors among the arguments.

Invariant: calls with one key have outputs of one recipe, on the same device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels.convolutions import (
    CONVOLUTION,
    CONVOLUTION_BACKWARD,
    convolution_settings,
)
from autobatch.devices.virtual.kernels.layouts import relaid
from autobatch.devices.virtual.placeholders import MASKS
from autobatch.devices.virtual.results import Recipe
from autobatch.support.torch_private import FakeTensor, OpOverload, op_implementations_checks

__all__ = [
    "Uncacheable",
    "alias",
    "build",
    "key_of",
    "layout",
    "recipe_of",
    "runs_on_meta",
    "work_out",
]


class Uncacheable(Exception):
    """A call whose answer depends on more than the layout of its arguments."""


# ops that change a tensor's layout, or whose result depends on values
_CHANGING = frozenset(
    (torch.Tag.inplace_view, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
)
_META, _CPU = torch.device("meta"), torch.device("cpu")
_TO_COPY = torch.ops.aten._to_copy.default
_CONVOLUTIONS = (CONVOLUTION, CONVOLUTION_BACKWARD)
_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten._unsafe_index.Tensor)
_IMMUTABLE = (str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def key_of(
    device: torch.device,
    func: OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: list[Any],
) -> tuple[Any, ...]:
    """Describe a call by its layouts; collect the tensors among the arguments in order.

    Raises:
        Uncacheable: its answer depends on more.
    """
    if func is _TO_COPY and _is_from_host(args[0], kwargs.get("device"), device):
        shape, stride, _, dtype = layout(args[0])
        return (id(func), _CPU, shape, stride, dtype, _key((*kwargs.items(),), device, tensors))
    key = _key(args, device, tensors)
    if kwargs:
        key = (key, _key(tuple(kwargs.items()), device, tensors))
    if func in _CONVOLUTIONS:
        return (id(func), key, convolution_settings())
    return (id(func), key)


def _is_from_host(tensor: Tensor, place: torch.device | None, device: torch.device) -> bool:
    """Whether a copy of a tensor on the CPU depends on its layout alone.

    Levers change a model there, weight by weight, and an attention's cache begins empty.
    """
    if place is not None and place != device and place != _CPU:
        return False
    if type(tensor) is FakeTensor:
        is_plain = tensor.constant is None and not tensor.dtype.is_complex
        return is_plain and tensor.fake_device == _CPU
    if type(tensor) is not Tensor or tensor.numel():
        return False
    return place is not None and tensor.device == _CPU and tensor.layout is torch.strided


def _key(values: Sequence[Any], device: torch.device, tensors: list[Any]) -> tuple[Any, ...]:
    parts: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            dtype, place = value.dtype, value.fake_device
            if dtype.is_complex or (place is not device and place != device):
                raise Uncacheable
            tensors.append(value)
            parts.append((value.shape, value.stride(), value.storage_offset(), dtype))
        elif kind in (list, tuple):
            parts.append((kind, _key(value, device, tensors)))
        elif kind in (int, float, bool):
            parts.append((kind, value))  # 1, 1.0 and True are equal as keys
        elif isinstance(value, _IMMUTABLE):
            parts.append(value)
        else:
            raise Uncacheable
    return tuple(parts)


def work_out(
    device: torch.device, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Recipe:
    """Run an op on plain meta tensors over the arguments' storages, and describe the result."""
    metas: list[Any] = []
    plain = _with_metas(args, metas)
    named = dict(zip(kwargs, _with_metas(kwargs.values(), metas), strict=True))
    try:
        output = relaid(func, plain, func(*plain, **named))
    except NotImplementedError:  # no meta kernel: FakeTensorMode knows what to do instead
        raise Uncacheable from None
    return _describe(output, metas, device)


def recipe_of(
    device: torch.device, func: OpOverload, output: Any, tensors: list[Any]
) -> Recipe | None:
    """Return how to make an output again, or None where that depends on values."""
    if _CHANGING.intersection(func.tags) and not _has_shape_of_indices(func, tensors):
        return None
    if func is _TO_COPY and output.fake_device == _CPU:
        shape, stride, offset, dtype = layout(output)
        return None if offset or dtype.is_complex else ("host", shape, stride, dtype)
    try:
        return _describe(output, tensors, device)
    except Uncacheable:
        return None


def _describe(output: Any, tensors: list[Any], device: torch.device) -> Recipe:
    """Say what an output is, given the tensors among the arguments."""
    numbered = [*enumerate(tensors)][::-1]  # the first of several that are alike wins
    same = {id(tensor): index for index, tensor in numbered}
    storages = {tensor.untyped_storage()._cdata: index for index, tensor in numbered}
    return _described(output, same, storages, device)


def _described(
    output: Any, same: dict[int, int], storages: dict[int, int], device: torch.device
) -> Recipe:
    if isinstance(output, Tensor):
        if id(output) in same:
            return ("same", same[id(output)])
        is_elsewhere = isinstance(output, FakeTensor) and output.fake_device != device
        if is_elsewhere or output.layout is not torch.strided or output.dtype.is_complex:
            raise Uncacheable
        shape, stride, offset, dtype = layout(output)
        storage = output.untyped_storage()
        if (index := storages.get(storage._cdata)) is not None:
            return ("view", index, shape, stride, offset, dtype)
        dense = torch.empty_strided(shape, stride, dtype=dtype, device=_META)
        if offset or dense.untyped_storage().nbytes() != storage.nbytes():
            raise Uncacheable
        return ("new", shape, stride, dtype)
    if isinstance(output, (list, tuple)):
        kind = list if isinstance(output, list) else tuple
        return ("list", kind, [_described(item, same, storages, device) for item in output])
    if output is None or isinstance(output, (int, float, bool)):
        return ("value", output)
    raise Uncacheable


def build(mode: Any, recipe: Recipe, tensors: list[Any]) -> Any:
    """Make an output for a mode, given the tensors among the arguments."""
    kind = recipe[0]
    if kind == "new":
        _, shape, stride, dtype = recipe
        return mode.wrap(torch.empty_strided(shape, stride, dtype=dtype, device=_META))
    if kind == "host":
        _, shape, stride, dtype = recipe
        return FakeTensor(mode, torch.empty_strided(shape, stride, dtype=dtype, device=_META), _CPU)
    if kind == "same":
        return tensors[recipe[1]]
    if kind == "view":
        _, index, *rest = recipe
        return mode.wrap(alias(tensors[index], *rest))
    if kind == "list":
        return recipe[1](build(mode, item, tensors) for item in recipe[2])
    return recipe[1]


def layout(tensor: Tensor) -> tuple[Any, Any, Any, torch.dtype]:
    """Return shape, strides, offset and dtype of a tensor."""
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype


def alias(tensor: Tensor, shape: Any, stride: Any, offset: int, dtype: torch.dtype) -> Tensor:
    """Make a meta tensor of another layout over the storage of a tensor."""
    elem = torch.empty((), dtype=dtype, device=_META)
    return elem.set_(tensor.untyped_storage(), offset, shape, stride)


def _with_metas(values: Iterable[Any], metas: list[Any]) -> list[Any]:
    """Replace tensors by meta tensors over the same storages, and collect those in order."""
    replaced: list[Any] = []
    for value in values:
        if type(value) is FakeTensor:
            metas.append(alias(value, *layout(value)))
            replaced.append(metas[-1])
        elif type(value) in (list, tuple):
            replaced.append(_with_metas(value, metas))
        else:
            replaced.append(value)
    return replaced


def _has_shape_of_indices(func: OpOverload, tensors: Sequence[Tensor]) -> bool:
    """Whether an op reads at places that are numbers, however many of them a mask would choose."""
    return func in _INDEXED and not any(tensor.dtype in MASKS for tensor in tensors[1:])


@functools.cache
def runs_on_meta(func: OpOverload) -> bool:
    """Whether an op's meta kernel tells its result, and FakeTensorMode has no rule of its own."""
    if func in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        return True  # its rule gives dimensions of size 1 other strides than PyTorch does
    return (
        func.namespace == "aten"
        and not _CHANGING.intersection(func.tags)
        and not func._can_decompose()
        and all(argument.name != "device" for argument in func._schema.arguments)
        and not any(applies(func) for applies, _ in op_implementations_checks)
    )
