"""Fake tensors on the simulated device, fast enough to run whole training windows.

`VirtualMode` is PyTorch's `FakeTensorMode` with three additions. A recorder sees every storage that
comes to life on the simulated device. Calls that repeat with the same shapes are answered from a
cache of output layouts; a training window repeats nearly all of them. Reads of values that do not
exist are answered by rules (`unknown_values.py`).

Invariant: a cached answer has the same shapes, strides, dtypes and aliasing as FakeTensorMode's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.dtype_checks import check_dtypes
from autobatch.devices.virtual.elements import is_plain
from autobatch.devices.virtual.in_place import MAY_WRITE_IN_PLACE, holders_of_a_sum, writes_in_place
from autobatch.devices.virtual.kernels.layouts import relaid
from autobatch.devices.virtual.kernels.orders import order_of
from autobatch.devices.virtual.kernels.outputs import BY_LAYOUT
from autobatch.devices.virtual.kernels.workspaces import Workspaces
from autobatch.devices.virtual.recipes import (
    Uncacheable,
    alias,
    build,
    key_of,
    layout,
    recipe_of,
    runs_on_meta,
    work_out,
)
from autobatch.devices.virtual.recorder import StorageRecorder
from autobatch.devices.virtual.results import Recipe, plain_recipe
from autobatch.devices.virtual.unknown_values import UnknownValues
from autobatch.errors import WorkloadError
from autobatch.support.interrupts import let_through
from autobatch.support.torch_private import (
    DisableTorchFunction,
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    preload_fake_tensors,
    tree_leaves,
    tree_map,
)

__all__ = ["VirtualMode"]

preload_fake_tensors()


_Repeated = tuple[Recipe, Any, str, bool, OpOverload]
"""Of calls with the same layouts: the recipe, what `Workspaces.call_of` returned, the op's name.

Then whether nothing follows of elements where nothing is known, and the op, held so that its id is
no other's.
"""

_META = torch.device("meta")
_DEVICE = torch.ops.prim.device.default
_MAY_WRITE_IN_PLACE = frozenset(map(id, MAY_WRITE_IN_PLACE))  # an op's own hash is slow


class VirtualMode(FakeTensorMode):
    """Run tensors of `device` without memory; everything else is a fake CPU tensor.

    Attributes:
        virtual_device: the simulated device.
        is_inside: whether an op is being answered.
        adopted: how many real tensors were moved there, as they met tensors of the device in an op.
    """

    def __init__(
        self,
        device: torch.device,
        recorder: StorageRecorder,
        unknown: UnknownValues,
        workspaces: Workspaces,
        move: Callable[[Tensor], Tensor],
        is_copy: Callable[[Tensor], bool],
        recipes: dict[Any, Any],
    ):
        """Prepare a mode.

        Args:
            device: the simulated device; tensors elsewhere are fake but not recorded.
            recorder: told of every storage on the device.
            unknown: asked first, for every op.
            workspaces: told of every op before it runs, for allocations that no tensor shows.
            move: returns the counterpart on the device of a tensor.
            is_copy: says of a tensor that is not on the device that it is a copy of a real one.
            recipes: the cache of output layouts, shared by runs on the same device.
        """
        super().__init__(allow_non_fake_inputs=True)
        self.cache_enabled = False  # ours is in front of it
        self.virtual_device = device
        self.adopted = 0
        self._recorder = recorder
        self._unknown = unknown
        self._workspaces = workspaces
        self._move = move
        self._is_copy = is_copy
        self._recipes = recipes
        self.is_inside = False
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
        """Answer by a rule, from the cache, or as FakeTensorMode does; then record."""
        if func is _DEVICE:  # half of all calls: C++ asks where tensors are
            return _META if self.in_kernel_invocation else args[0].fake_device
        for kind in types:  # quantized weights: again with what they are made of
            if kind is not FakeTensor and _is_composed(kind):
                return NotImplemented
        if self.is_inside:  # a decomposition inside FakeTensorMode: no kernel, no memory
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        let_through()
        self.is_inside = True
        try:
            with DisableTorchFunction():  # what happens in here is no call of the user's
                return self._dispatch(func, args, kwargs or {})
        finally:
            self.is_inside = False

    def _dispatch(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        place = kwargs.get("device")
        if place is not None and place.type == "cuda" != self.virtual_device.type:
            # PyTorch's own Python functions ask a tensor where it is, and are told of CUDA
            kwargs = {**kwargs, "device": self.virtual_device}
        if id(func) in _MAY_WRITE_IN_PLACE and writes_in_place(
            func, args, self._recorder.latest(args[0]), self._sole_holders
        ):
            return self._in_place(func, args, kwargs)
        tensors: list[Any] = []
        key = None
        unknown = self._unknown
        if not unknown.has_rule(func) or func in BY_LAYOUT or unknown.is_plain(func, args):
            try:
                key = key_of(self.virtual_device, func, args, kwargs, tensors)
            except Uncacheable:
                pass
            else:
                known = self._recipes.get(key)
                if known is not None:
                    return self._repeated(known, func, args, kwargs, tensors)
        if args and self._is_virtual(args[0]):
            check_dtypes(func, args, kwargs)
        were_plain = key is not None and all(map(is_plain, tensors))
        call = self._workspaces.call_of(func, args, kwargs)
        after = self._workspaces.begun(call)
        output = unknown.answer(self, func, args, kwargs)
        recipe = None
        if output is NotImplemented:
            output, recipe = self._answer(func, args, kwargs, key, tensors)
        elif key is not None:
            recipe = recipe_of(self.virtual_device, func, output, tensors)
        self._created(output, func, args)
        if after is not None:
            after()
        unknown.follow(func, args, kwargs, output)
        if recipe is not None:
            is_silent = were_plain and unknown.is_silent(func, tensors, output)
            self._recipes[key] = (recipe, call, func.name(), is_silent, func)
        return output

    def _repeated(
        self,
        known: _Repeated,
        func: OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: list[Any],
    ) -> Any:
        """Answer a call as one before it with arguments of the same layouts."""
        recipe, call, name, is_silent, _ = known
        after = self._workspaces.begun(call)
        kind = recipe[0]
        output = build(self, recipe, tensors)
        if kind == "new":
            self._recorder.created(output, name)
        elif kind == "list":
            self._created(output, func, args)
        if after is not None:
            after()
        if not is_silent or not all(map(is_plain, tensors)):
            self._unknown.follow(func, args, kwargs, output)
        return output

    def _in_place(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the first argument's memory as the result of an op."""
        after = self._workspaces.begun(self._workspaces.call_of(func, args, kwargs))
        if after is not None:
            after()
        if func is torch.ops.aten.add.Tensor and not torch.is_grad_enabled():
            return args[0]  # the engine's sum
        return self.wrap(alias(args[0], *layout(args[0])))

    def _answer(
        self,
        func: OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        key: tuple[Any, ...] | None,
        tensors: list[Any],
    ) -> tuple[Any, Recipe | None]:
        """Answer as FakeTensorMode does; also return how to make the output again, if known.

        Without a `key` the answer depends on more than the layouts of `tensors`.
        """
        if key is None:
            args, kwargs = self._adopted(args, kwargs)
        elif (plain := plain_recipe(func, args, kwargs, tensors)) is not None:
            return build(self, plain, tensors), plain
        elif runs_on_meta(func):
            try:
                recipe = work_out(self.virtual_device, func, args, kwargs)
            except Uncacheable:
                args, kwargs = self._adopted(args, kwargs)
                key = None
            else:
                return build(self, recipe, tensors), recipe
        output = relaid(func, args, super().__torch_dispatch__(func, (), args, kwargs))
        known = None if key is None else recipe_of(self.virtual_device, func, output, tensors)
        return output, known

    def _adopted(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Move real tensors that user code holds (class weights, say) to where the others are."""
        if not any(map(self._is_virtual, tree_leaves((args, kwargs)))):
            return args, kwargs
        return tree_map(self._adopt, (args, kwargs))  # type: ignore[no-any-return]

    def _adopt(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf  # numbers may live on the CPU
        if leaf.layout is not torch.strided:
            raise WorkloadError(
                f"the step uses a sparse tensor of shape {tuple(leaf.shape)} on the GPU, which "
                "cannot be simulated: use a dense one for the plan, or measure on a real GPU"
            )
        if isinstance(leaf, FakeTensor) and (self._is_virtual(leaf) or not self._is_copy(leaf)):
            return leaf
        with self:
            moved = self._move(leaf)
        self._recorder.created(moved, "adopted")
        self.adopted += 1
        return moved

    def _is_virtual(self, value: Any) -> bool:
        return isinstance(value, FakeTensor) and (
            value.fake_device is self.virtual_device or value.fake_device == self.virtual_device
        )

    def run(self, func: OpOverload, *args: Any) -> Any:
        """Run an op from inside a rule; its results are recorded."""
        output = super().__torch_dispatch__(func, (), args, {})
        self._created(output, func, args)
        return output

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
        """Make a tensor on `like`'s device from inside a rule."""
        return self._like(like, torch.empty(shape, dtype=dtype, device=_META))

    def strided(self, tensor: Tensor, shape: Any, stride: Any) -> Tensor:
        """Make a tensor of a dense layout from inside a rule, like another in all else."""
        elem = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=_META)
        return self._like(tensor, elem)

    def part(self, buffer: Tensor, shape: tuple[int, ...], offset: int) -> Tensor:
        """Make a contiguous view of a buffer from inside a rule, from an element on."""
        stride = torch.empty(shape, device=_META).stride()
        return FakeTensor(self, alias(buffer, shape, stride, offset, buffer.dtype), buffer.device)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Make a tensor of the same layout from inside a rule."""
        shape, stride, _, dtype = layout(tensor)
        elem = torch.empty_like(alias(tensor, shape, stride, 0, dtype))
        return self._like(tensor, elem)

    def fake_of(self, value: Tensor) -> Tensor:
        """Make a fake of a real tensor, on the device where that is."""
        return FakeTensor(self, torch.empty_like(value, device=_META), value.device)

    def from_tensor(self, tensor: Tensor, **kwargs: Any) -> FakeTensor:
        """Make a fake of a tensor of the sample, with its values where they may be sizes."""
        fake = super().from_tensor(tensor, **kwargs)
        self._unknown.known.give(fake, tensor)
        return fake

    def _like(self, tensor: Tensor, elem: Tensor) -> FakeTensor:
        """Make a tensor of a layout on the device of another one."""
        return (
            self.wrap(elem) if self._is_virtual(tensor) else FakeTensor(self, elem, tensor.device)
        )

    def wrap(self, elem: Tensor) -> FakeTensor:
        """Do what FakeTensor's constructor does, without its many checks."""
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

    def _created(self, output: Any, func: OpOverload, args: Sequence[Any]) -> None:
        """Record what an op made, in the order in which CUDA's kernel allocates it.

        A view of what a kernel makes elsewhere (the seed of attention's dropout) is nothing new.
        """
        if self._is_virtual(output):
            if not (args and self._is_virtual(args[0]) and _share_memory(output, args[0])):
                self._recorder.created(output, func.name())
        elif isinstance(output, (list, tuple)):
            order = order_of(func, args)
            for item in output if order is None else [output[place] for place in order]:
                self._created(item, func, args)


@functools.cache
def _is_composed(kind: type) -> bool:
    """Whether a class of tensors takes ops apart into ops on its parts; DTensor is another case."""
    is_usual = issubclass(kind, FakeTensor) or hasattr(kind, "placements")
    return not is_usual and hasattr(kind, "__tensor_flatten__")


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
