"""Sharding over GPUs that are not there: PyTorch's own FSDP2 as rank 0 of a fake process group.

`fully_shard` runs as it is: what it keeps, all-gathers, frees and reduce-scatters on a rank comes
from PyTorch's code. A `fake` process group stands for the other ranks: its collectives return at
once. What a simulation has to add is here: memory that FSDP2 frees and takes again by resizing
storages, the streams that it allocates on (the caching allocator shares no blocks between streams),
and DTensor's shape inference, which computes on tensors of the whole model that exist nowhere.

What it leaves out: buffers of NCCL, which are outside the allocator; and time. FSDP2 keeps a
collective's buffers by reference until the event that ends it has been waited for, and calls no
`record_stream`, so when memory is freed does not depend on how streams overlap. User code's own
streams are one and the same. The model arrives as if it had been made on `meta`, or sharded block
by block: whole parameters are never counted.

Invariant: a process that has no process group has none afterwards, whatever happens.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily

from autobatch.devices.virtual.fake_mode import VirtualMode
from autobatch.devices.virtual.recorder import StorageRecorder
from autobatch.errors import UsageError
from autobatch.memory.trace import Trace
from autobatch.support.patching import patched
from autobatch.workload.workload import Workload

__all__ = ["RankRecorder", "as_rank_zero", "rank_mode", "repeated_blocks", "sharded"]


_UNSCALE = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default
_REDUCTIONS = frozenset(("_foreach_norm", "_foreach_max", "_foreach_powsum"))


def sharded(model: nn.Module, workload: Workload, policy: Any) -> list[str]:
    """Apply FSDP2 to a module in place, as rank 0 of the process group, and return what to say.

    Args:
        model: the copied module, whole, on the device.
        workload: says whether a policy of the user's is to be applied.
        policy: the copied function, where it is.

    Raises:
        UsageError: the function applied `fully_shard` to nothing.
    """
    from torch.distributed.fsdp import FSDPModule

    notes = []
    with _meshes_can_be_made():
        if workload.shares == "custom":
            policy(model)
        elif not _shard_blocks(model):
            notes.append(
                f"{type(model).__name__} has no repeated blocks: FSDP2 gathers all of its "
                "parameters at once; pass a function as sharding to shard its parts"
            )
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UsageError(
            "the function given as sharding applied fully_shard to no module of the model: call "
            "torch.distributed.fsdp.fully_shard on its blocks, then on the model itself"
        )
    if workload.autocast is not None:
        notes.append(
            f"autocast keeps {workload.autocast} copies of all weights that FSDP2 gathers, whole, "
            "while forward runs, and without checkpointing until backward: "
            "fully_shard(…, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)) in a "
            "function given as sharding, without autocast, keeps none"
        )
    return notes


def _shard_blocks(model: nn.Module) -> bool:
    """Shard a model the usual way, and return whether it has blocks."""
    from torch.distributed.fsdp import fully_shard

    blocks = repeated_blocks(model)
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    return bool(blocks)


@contextlib.contextmanager
def _meshes_can_be_made() -> Iterator[None]:
    """Let tensors of ranks be real, whose values are read, and tensors of parameters be fake."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    make = FSDPParamGroup.__init__

    def made(group: Any, *args: Any, **kwargs: Any) -> None:
        with mode:
            make(group, *args, **kwargs)

    with unset_fake_temporarily() as found, patched(FSDPParamGroup, __init__=made):
        mode: Any = found
        yield


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules that FSDP2 usually shards one by one, inner ones first.

    For a transformers model, those of the classes in `_no_split_modules`. Elsewhere, the members of
    each `ModuleList`, and those of a `Sequential` that repeat a class and hold other modules; where
    a Sequential makes up most of a member, its members in its place (the stages of an image model
    hold their blocks in one). Without any, the outermost modules of one class side by side. A block
    that shares a parameter with the rest of the model is left to the root, as FSDP2 asks for.
    """
    named = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    if named:
        blocks = [
            module
            for module in _inner_first(model)
            if type(module).__name__ in named and module is not model
        ]
    else:
        blocks = [block for block, _ in _stacked(model)] or _side_by_side(model)
    everywhere = Counter(map(id, _slots(model)))
    return [
        block
        for block in blocks
        if (within := Counter(map(id, _slots(block))))
        and all(everywhere[key] == count for key, count in within.items())
    ]


def _inner_first(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module's descendants before the module, each once."""
    return iter(reversed(list(module.modules())))


def _slots(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's parameters, as often as they are in it."""
    return [parameter for _, parameter in module.named_parameters(remove_duplicate=False)]


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _stacked(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Return the members of stacks, and of each whether it is in a Sequential."""
    is_sequential = isinstance(module, nn.Sequential)
    if is_sequential:
        members = _alike(module)
    elif isinstance(module, nn.ModuleList):
        members = _trained(module)
    else:
        members = []
    found: list[tuple[nn.Module, bool]] = []
    for child in _trained(module):
        inner = _stacked(child)
        in_order = sum(_elements(block) for block, is_in_order in inner if is_in_order)
        is_block = len(members) > 1 and child in members and 2 * in_order <= _elements(child)
        found += [(child, is_sequential)] if is_block and _runs(child) else inner
    return found


def _side_by_side(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules of one class that share a parent."""
    level = [model]
    while level:
        for module in level:
            if found := _alike(module):
                return found
        level = [child for module in level for child in module.children()]
    return []


def _trained(module: nn.Module) -> list[nn.Module]:
    """Return the children that have parameters."""
    return [child for child in module.children() if any(True for _ in child.parameters())]


def _alike(module: nn.Module) -> list[nn.Module]:
    """Return the children that have parameters, modules inside, and a sibling of their class."""
    children = [child for child in _trained(module) if _runs(child) and any(child.children())]
    kinds = Counter(map(type, children))
    return [child for child in children if kinds[type(child)] > 1]


def _runs(module: nn.Module) -> bool:
    """Whether a module can be called; `fully_shard` takes no mere containers."""
    return type(module).forward is not nn.Module.forward


@functools.cache
def rank_mode() -> type[VirtualMode]:
    """Return a mode that leaves DTensors to themselves: they call again with their local parts.

    Two exceptions: GradScaler's check, whose answer would get lost on its way between ranks, and
    an optimizer's ops on whole lists, for which DTensor takes time by the square of their length.
    """
    from torch.distributed.tensor import DTensor

    class RankMode(VirtualMode):
        def __torch_dispatch__(
            self,
            func: OpOverload,
            types: Sequence[type],
            args: Sequence[Any] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            if DTensor not in types or func is _UNSCALE:
                return super().__torch_dispatch__(func, types, args, kwargs)
            local = _local_lists(func, args, kwargs or {})
            if local is None:
                return NotImplemented
            made = super().__torch_dispatch__(func, (), local, kwargs)
            if made is None:  # in place
                return None
            first = args[0]
            return [
                DTensor(tensor, of._spec, requires_grad=False)
                for tensor, of in zip(made, first, strict=True)
            ]

    return RankMode


def _local_lists(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any] | None:
    """Return the arguments of an elementwise op on lists of tensors that are all sharded alike.

    The lists are replaced by those of local parts; None for any other op, or other tensors.
    """
    name = func._opname
    if not name.startswith("_foreach_") or name in _REDUCTIONS:
        return None
    if any(isinstance(value, (Tensor, list, tuple)) for value in kwargs.values()):
        return None
    local: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            return None
        if isinstance(arg, (list, tuple)) and isinstance(arg[0], Tensor):
            if len(arg) != len(args[0]) or not all(map(_sharded_alike, arg, args[0])):
                return None
            arg = [tensor._local_tensor for tensor in arg]
        local.append(arg)
    return local


def _sharded_alike(tensor: Any, other: Any) -> bool:
    specs = getattr(tensor, "_spec", None), getattr(other, "_spec", None)
    return (
        specs[0] is not None
        and specs[1] is not None
        and specs[0].placements == specs[1].placements
        and specs[0].mesh == specs[1].mesh
    )


class RankRecorder(StorageRecorder):
    """A recorder that knows streams, storages that are resized, and tensors that are none.

    Buffers of collectives and gathered parameters are "temporaries", whichever phase makes them.
    """

    def __init__(self, stream: Callable[[], int]):
        """Record; `stream` tells the number of the current stream, 0 for the first."""
        super().__init__()
        self._stream = stream
        self._streams: dict[int, int] = {}
        self._emptied: set[int] = set()
        self._muted = False
        self._gathers = False

    def created(self, tensor: Tensor, op: str) -> None:
        """Log an allocation if `tensor`'s storage has not been seen."""
        if self._muted:
            return
        index = len(self._blocks)
        super().created(tensor, op)
        if index < len(self._blocks):
            if stream := self._stream():
                self._streams[index] = stream
            if self._gathers:
                self._blocks[index].category = "temporaries"

    def resized(self, storage: torch.UntypedStorage, resize: Callable[[], Any]) -> Any:
        """Resize a storage: to the allocator, its old memory goes and new memory comes."""
        ref = None if self._muted else self._live.pop(storage._cdata, None)
        if ref is None:
            return resize()
        old = self._blocks[ref.block]
        self._events.append(~ref.block)
        result = resize()
        index = len(self._blocks)
        self.created(_Storage(storage), old.op)  # type: ignore[arg-type]
        self._blocks[index].category = old.category
        if not self._blocks[index].size_bytes:
            self._emptied.add(index)
        return result

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Take no notice of what is made inside: it would exist nowhere."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """What is made inside serves a collective."""
        before, self._gathers = self._gathers, True
        try:
            yield
        finally:
            self._gathers = before

    def trace(self, micro_batch: int, accumulation_steps: int) -> Trace:
        """Return what was seen so far, without whole parameters on their way to shards."""
        whole = super().trace(micro_batch, accumulation_steps)
        blocks = list(whole.blocks)
        for index, stream in self._streams.items():
            blocks[index] = replace(blocks[index], stream=stream)
        start = next((mark.event for mark in whole.marks if mark.phase != "setup"), 0)
        passing = {~event for event in whole.events[:start] if event < 0}
        return _without(replace(whole, blocks=tuple(blocks)), passing | self._emptied)


class _Storage:
    """What a recorder asks of a tensor."""

    def __init__(self, storage: torch.UntypedStorage):
        self._storage = storage

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._storage


def _without(trace: Trace, left_out: set[int]) -> Trace:
    """Leave blocks out of a trace."""
    number: dict[int, int] = {}
    for index in range(len(trace.blocks)):
        if index not in left_out:
            number[index] = len(number)
    events: list[int] = []
    places = [0]
    for event in trace.events:
        index = event if event >= 0 else ~event
        if index in number:
            events.append(number[index] if event >= 0 else ~number[index])
        places.append(len(events))
    return replace(
        trace,
        blocks=tuple(trace.blocks[index] for index in number),
        events=tuple(events),
        marks=tuple(replace(mark, event=places[mark.event]) for mark in trace.marks),
    )


@contextlib.contextmanager
def as_rank_zero(world_size: int, device: torch.device) -> Iterator[RankRecorder]:
    """Be rank 0 of a fake process group, on a device with FSDP2's streams; give its recorder.

    To be entered before PyTorch is made to take the device for a CUDA GPU: the modules imported
    here add to lists that are replaced for as long as it is.

    Raises:
        UsageError: this process has a process group already, or PyTorch was built without any, or
            with an FSDP2 that is not known here.
    """
    if not dist.is_available():
        raise UsageError(
            "this PyTorch was built without torch.distributed, which sharding over GPUs needs: "
            "use a build that has it"
        )
    if dist.is_initialized():
        raise UsageError(
            f"this process is rank {dist.get_rank()} of {dist.get_world_size()} in a process group "
            "of its own, and sharding is simulated in another: ask before init_process_group, with "
            "isolate=True, or on the command line"
        )
    import torch.distributed.fsdp
    import torch.distributed.tensor
    import torch.testing._internal.distributed.fake_pg

    c10d: Any = dist
    handle = getattr(torch, device.type)
    streams = _Streams(handle)
    recorder = RankRecorder(streams.number)
    hook = sys.excepthook  # replaced by init_process_group, which prefixes every line
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "excepthook", hook)
        stack.callback(_forget_rank)
        dist.init_process_group(
            f"cpu:fake,{device.type}:fake",
            store=c10d.HashStore(),
            rank=0,
            world_size=world_size,
        )
        stack.callback(dist.destroy_process_group)
        # or C++ warns that it knows no backend for a device of no type
        c10d.group.WORLD._set_default_backend(c10d.ProcessGroup.BackendType.CUSTOM)
        if device.type != "cuda":
            stack.enter_context(_lent(handle, streams.answers()))
        try:
            for target, replacements in _substitutes(recorder, device, world_size):
                stack.enter_context(patched(target, **replacements))
        except (AttributeError, ImportError) as error:
            raise UsageError(
                f"FSDP2 of torch {torch.__version__} is built in a way that is not known here "
                f"({error}): use torch 2.13 to 2.15, or a newer autobatch"
            ) from error
        yield recorder


def _forget_rank() -> None:
    """Let C++ no longer prefix its messages with a rank."""
    forget = getattr(torch._C._distributed_c10d, "_set_global_rank", None)
    if forget is not None:
        forget(-1)


def _substitutes(
    recorder: RankRecorder, device: torch.device, world_size: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield what to replace in PyTorch: where, and by what."""
    from torch.distributed import device_mesh
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fully_shard
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        return recorder.resized(storage, lambda: resize(storage, size))

    yield torch.UntypedStorage, {"resize_": resized}

    infer = ShardingPropagator._propagate_tensor_meta_non_cached

    def inferred(propagator: Any, *args: Any) -> Any:
        with recorder.muted():
            return infer(propagator, *args)

    yield ShardingPropagator, {"_propagate_tensor_meta_non_cached": inferred}

    names = ("foreach_all_gather", "foreach_all_gather_copy_out", "foreach_reduce")
    collectives = {name: _gathering(recorder, getattr(_fsdp_param_group, name)) for name in names}
    # labels for profilers take a tenth of the time
    unlabelled = {"record_function": lambda *_: contextlib.nullcontext()}
    yield _fsdp_param_group, {**collectives, **unlabelled}

    mesh_class: Any = device_mesh.DeviceMesh
    make = mesh_class.__init__

    def made(mesh: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        make(mesh, device.type if device_type == "cuda" else device_type, *args, **kwargs)

    yield mesh_class, {"__init__": made}
    # init_device_mesh takes no device type with an underscore
    yield _fully_shard, {"_init_default_mesh": lambda: mesh_class(device.type, range(world_size))}


def _gathering(recorder: RankRecorder, collective: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with recorder.gathering():
            return collective(*args, **kwargs)

    return run


class _Event:
    """Something to wait for that has happened."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, stream: Any = None) -> _Event:
        return self

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream:
    """A stream of the simulated device; work on it is done at once."""

    device_index = 0

    def __init__(self, stream_id: int):
        self.stream_id = stream_id
        kind: Any = torch._C._autograd.DeviceType.PrivateUse1
        self.device_type = int(kind)

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None:
        pass


class _Streams:
    """The streams of the device: which one is current, and numbers for them in a trace."""

    def __init__(self, handle: Any):
        self._handle = handle
        self._made: list[_Stream] = []
        self._current = self._make()
        self._numbers: dict[int, int] = {}

    def number(self) -> int:
        """Return the number of the current stream, 0 for the one that the run begins on."""
        stream_id = self._handle.current_stream().stream_id
        return self._numbers.setdefault(stream_id, len(self._numbers))

    def answers(self) -> dict[str, Callable[..., Any]]:
        """Return what PyTorch looks up in a device's module."""
        return {
            "Stream": lambda *args, **kwargs: self._make(),
            "Event": _Event,
            "current_stream": lambda device=None: self._current,
            "stream": self._switched,
            "is_initialized": lambda: True,
        }

    def _make(self) -> _Stream:
        self._made.append(_Stream(len(self._made)))
        return self._made[-1]

    @contextlib.contextmanager
    def _switched(self, stream: _Stream | None) -> Iterator[None]:
        before = self._current
        self._current = stream or before
        try:
            yield
        finally:
            self._current = before


@contextlib.contextmanager
def _lent(target: Any, attributes: dict[str, Any]) -> Iterator[None]:
    """Set attributes of an object that it does not have itself, and take them away again."""
    vars(target).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(target)[name]
