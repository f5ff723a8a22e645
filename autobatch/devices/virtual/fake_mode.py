"""Fake tensors on the simulated device, fast enough to run whole training windows.

`VirtualMode` is PyTorch's `FakeTensorMode` with three additions: a recorder sees every storage
that comes to life on the simulated device, calls that repeat with the same shapes are answered
from a cache of output layouts (a training window repeats nearly all of them), and reads of values
that do not exist are answered by stand-ins (`unknown.py`).

Invariant: a cached answer has the same shapes, strides, dtypes and aliasing as FakeTensorMode's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from autobatch.devices.virtual.gradient_sums import adds_in_place, holders_of_a_sum
from autobatch.support.torch_private import (
    DisableTorchFunction,
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    op_implementations_checks,
    preload_fake_tensors,
    tree_leaves,
    tree_map,
)

__all__ = ["Recorder", "VirtualMode"]

preload_fake_tensors()


class Recorder(Protocol):
    """Sees the storages of the simulated device."""

    def created(self, tensor: Tensor, op: str) -> None:
        """A storage may have come to life as `tensor`'s; called for new and for old ones."""


class UnknownValues(Protocol):
    """Answers for values that do not exist."""

    def __call__(
        self, mode: VirtualMode, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Answer an op, or return NotImplemented."""

    def note(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Remember what is known of a result's elements."""

    def given(self, fake: Tensor, real: Tensor) -> None:
        """Hear of a real tensor, such as one of the sample, and of its fake."""


class _Uncacheable(Exception):
    """A call whose answer depends on more than the layout of its arguments."""


# What to do with one output: ("same", i) is argument i itself, ("view", i, layout) aliases its
# storage, ("new", layout) owns fresh storage, ("value", v) is a plain Python value.
_Recipe = tuple[Any, ...]

# ops that change a tensor's layout, or whose result depends on values
_CHANGING = frozenset(
    (torch.Tag.inplace_view, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
)
_META = torch.device("meta")
_IMMUTABLE = (str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class VirtualMode(FakeTensorMode):
    """Run tensors of `device` without memory; everything else is a fake CPU tensor."""

    def __init__(
        self,
        device: torch.device,
        recorder: Recorder,
        unknown: UnknownValues,
        before: Callable[[OpOverload, Sequence[Any]], Callable[[], None] | None],
        adopt: Callable[[Tensor], Tensor],
        recipes: dict[Any, Any],
    ):
        """Prepare a mode.

        Args:
            device: the simulated device; tensors elsewhere are fake but not recorded.
            recorder: told of every storage on the device.
            unknown: asked first, for every op.
            before: called before every op that runs on the device, for hidden allocations; may
                return what to call after it.
            adopt: moves a real tensor that meets tensors of the device in an op.
            recipes: the cache of output layouts, shared by runs on the same device.
        """
        super().__init__(allow_non_fake_inputs=True)
        self.cache_enabled = False  # ours is in front of it
        self.virtual_device = device
        self._recorder = recorder
        self._unknown = unknown
        self._before = before
        self._adopt = adopt
        self.adopted = 0
        self._recipes = recipes
        self._depth = 0
        self._attributes: dict[str, Any] | None = None
        self._sole_holders = holders_of_a_sum()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave `__torch_dispatch__` unwrapped: no torch.compile here, and a call less per op."""
        return False

    @property
    def avoid_device_init(self) -> bool:
        """Whether `torch.tensor(…, device=…)` must not touch a real device: always."""
        return True

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer from the cache, from a stand-in, or as FakeTensorMode does; then record."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all calls: C++ asks where tensors are
            return _META if self.in_kernel_invocation else args[0].fake_device
        if self._depth:  # a decomposition inside FakeTensorMode: no kernel, no memory
            return super().__torch_dispatch__(func, types, args, kwargs)
        self._depth += 1
        try:
            with DisableTorchFunction():  # what happens in here is no call of the user's
                return self._dispatch(func, types, args, kwargs)
        finally:
            self._depth -= 1

    def _dispatch(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if adds_in_place(func, args, self._sole_holders):
            return args[0]
        after = self._before(func, args)
        output = self._unknown(self, func, args, kwargs)
        if output is NotImplemented:
            output = self._answer(func, types, args, kwargs)
        else:
            self._created(output, func.name())
        if after is not None:
            after()
        self._unknown.note(func, args, kwargs, output)
        return output

    def _answer(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Answer from the cache or as FakeTensorMode does, and record what came to life."""
        tensors: list[Any] = []
        try:
            key = (func, self._key(args, tensors), self._key(tuple(kwargs.items()), tensors))
            recipe = self._recipes.get(key)
            if recipe is None and _runs_on_meta(func):
                recipe = self._recipes[key] = self._work_out(func, args, kwargs)
        except _Uncacheable:
            args, kwargs = self._adopted(args, kwargs)
            output = super().__torch_dispatch__(func, types, args, kwargs)
        else:
            if recipe is not None:
                return self._build(recipe, tensors, func)
            output = super().__torch_dispatch__(func, types, args, kwargs)
            self._remember(key, func, output, tensors)
        self._created(output, func.name())
        return output

    def _adopted(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Move real tensors that user code holds (class weights, say) to where the others are."""
        leaves = tree_leaves((args, kwargs))
        if not any(self._is_virtual(leaf) for leaf in leaves):
            return args, kwargs
        return tree_map(self._adopt_leaf, (args, kwargs))  # type: ignore[no-any-return]

    def _adopt_leaf(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor) or not leaf.dim():
            return leaf  # numbers may live on the CPU
        with self:
            adopted = self._adopt(leaf)
        self._recorder.created(adopted, "adopted")
        self.adopted += 1
        return adopted

    def _is_virtual(self, value: Any) -> bool:
        return isinstance(value, FakeTensor) and value.fake_device == self.virtual_device

    def run(self, func: OpOverload, *args: Any) -> Any:
        """Run an op from inside a stand-in; its results are recorded."""
        output = super().__torch_dispatch__(func, (), args, {})
        self._created(output, func.name())
        return output

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
        """Make a tensor on `like`'s device from inside a stand-in."""
        elem = torch.empty(shape, dtype=dtype, device="meta")
        return FakeTensor(self, elem, like.device)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Make a tensor of the same layout from inside a stand-in."""
        elem = torch.empty_like(_alias(tensor, 0, tensor.shape, tensor.stride()))
        return FakeTensor(self, elem, tensor.device)

    def fake_of(self, value: Tensor) -> Tensor:
        """Make a fake of a real tensor, on its device."""
        return FakeTensor(self, torch.empty_like(value, device=_META), value.device)

    def from_tensor(self, tensor: Tensor, **kwargs: Any) -> FakeTensor:
        """Make a fake of a tensor of the sample."""
        fake = super().from_tensor(tensor, **kwargs)
        self._unknown.given(fake, tensor)
        return fake

    def _key(self, values: Sequence[Any], tensors: list[Any]) -> tuple[Any, ...]:
        """Describe arguments by layout; collect the tensors among them in order."""
        parts: list[Any] = []
        for value in values:
            kind = type(value)
            if kind is FakeTensor:
                if value.fake_device is not self.virtual_device and (
                    value.fake_device != self.virtual_device
                ):
                    raise _Uncacheable
                if value.dtype.is_complex:
                    raise _Uncacheable
                tensors.append(value)
                parts.append(
                    (tuple(value.shape), value.stride(), value.storage_offset(), value.dtype)
                )
            elif kind in (list, tuple):
                parts.append((kind, self._key(value, tensors)))
            elif kind in (int, float, bool):
                parts.append((kind, value))  # 1, 1.0 and True are equal as keys
            elif isinstance(value, _IMMUTABLE):
                parts.append(value)
            else:
                raise _Uncacheable
        return tuple(parts)

    def _work_out(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> _Recipe:
        """Run an op on plain meta tensors over the arguments' storages, and describe the result."""
        metas: list[Any] = []
        plain = _with_metas(args, metas)
        named = dict(zip(kwargs, _with_metas(kwargs.values(), metas), strict=True))
        try:
            output = func(*plain, **named)
        except NotImplementedError:  # no meta kernel: FakeTensorMode knows what to do instead
            raise _Uncacheable from None
        return self._describe(output, metas)

    def _remember(self, key: Any, func: OpOverload, output: Any, tensors: list[Any]) -> None:
        try:
            recipe = self._describe(output, tensors)
        except _Uncacheable:
            return
        if not _CHANGING.intersection(func.tags):
            self._recipes[key] = recipe

    def _describe(self, output: Any, tensors: list[Any]) -> _Recipe:
        """Say what an output is, given the tensors among the arguments."""
        same: dict[int, int] = {}
        storages: dict[int, int] = {}
        for index, tensor in enumerate(tensors):
            same.setdefault(id(tensor), index)
            storages.setdefault(tensor.untyped_storage()._cdata, index)
        return self._described(output, same, storages)

    def _described(self, output: Any, same: dict[int, int], storages: dict[int, int]) -> _Recipe:
        if isinstance(output, Tensor):
            if id(output) in same:
                return ("same", same[id(output)])
            if isinstance(output, FakeTensor) and output.fake_device != self.virtual_device:
                raise _Uncacheable
            if output.layout is not torch.strided or output.dtype.is_complex:
                raise _Uncacheable
            layout = (tuple(output.shape), output.stride(), output.storage_offset(), output.dtype)
            index = storages.get(output.untyped_storage()._cdata)
            if index is not None:
                return ("view", index, *layout)
            dense = torch.empty_strided(layout[0], layout[1], dtype=output.dtype, device="meta")
            if output.storage_offset() or (
                dense.untyped_storage().nbytes() != output.untyped_storage().nbytes()
            ):
                raise _Uncacheable
            return ("new", *layout)
        if isinstance(output, (list, tuple)):
            kind = list if isinstance(output, list) else tuple
            return ("list", kind, [self._described(item, same, storages) for item in output])
        if output is None or isinstance(output, (int, float, bool)):
            return ("value", output)
        raise _Uncacheable

    def _build(self, recipe: _Recipe, tensors: list[Any], func: OpOverload) -> Any:
        kind = recipe[0]
        if kind == "new":
            _, shape, stride, _, dtype = recipe
            output = self._wrap(torch.empty_strided(shape, stride, dtype=dtype, device=_META))
            self._recorder.created(output, func.name())
            return output
        if kind == "same":
            return tensors[recipe[1]]
        if kind == "view":
            _, index, shape, stride, offset, dtype = recipe
            return self._wrap(_alias(tensors[index], offset, shape, stride, dtype))
        if kind == "list":
            return recipe[1](self._build(item, tensors, func) for item in recipe[2])
        return recipe[1]

    def _wrap(self, elem: Tensor) -> FakeTensor:
        """Do what FakeTensor's constructor does, without its hundred checks."""
        if self._attributes is None:
            self._attributes = dict(FakeTensor(self, elem, self.virtual_device).__dict__)
        output: FakeTensor = Tensor._make_subclass(
            FakeTensor,
            elem,
            False,
            dispatch_device=True,
            device_for_backend_keys=self.virtual_device,
        )
        output.__dict__.update(self._attributes)
        return output

    def _created(self, output: Any, op: str) -> None:
        if isinstance(output, FakeTensor):
            if output.fake_device == self.virtual_device:
                self._recorder.created(output, op)
        elif isinstance(output, (list, tuple)):
            for item in output:
                self._created(item, op)


def _alias(
    tensor: Tensor, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None
) -> Tensor:
    """Make a meta tensor of another layout over the storage of a tensor."""
    elem = torch.empty((), dtype=dtype or tensor.dtype, device=_META)
    return elem.set_(tensor.untyped_storage(), offset, shape, stride)


def _with_metas(values: Iterable[Any], metas: list[Any]) -> list[Any]:
    """Replace tensors by meta tensors over the same storages, and collect those in order."""
    replaced: list[Any] = []
    for value in values:
        if type(value) is FakeTensor:
            metas.append(_alias(value, value.storage_offset(), value.shape, value.stride()))
            replaced.append(metas[-1])
        elif type(value) in (list, tuple):
            replaced.append(_with_metas(value, metas))
        else:
            replaced.append(value)
    return replaced


@functools.cache
def _runs_on_meta(func: OpOverload) -> bool:
    """Whether FakeTensorMode has no rule of its own for an op, and its meta kernel says it all."""
    return (
        func.namespace == "aten"
        and not _CHANGING.intersection(func.tags)
        and not func._can_decompose()
        and all(argument.name != "device" for argument in func._schema.arguments)
        and not any(applies(func) for applies, _ in op_implementations_checks)
    )
