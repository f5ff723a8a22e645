"""Sharding over GPUs that are not there: PyTorch's own FSDP as rank 0 of a fake process group.

`fully_shard`, `FullyShardedDataParallel` (FSDP1) and tensor parallel plans run unchanged: what they
keep, all-gather, free and reduce-scatter on a rank comes from PyTorch's code. A `fake` process
group takes the place of the other ranks: its collectives return at once. A simulation has to add
three things: it follows the memory that is freed and taken again by resizing storages; it tells
which stream allocates, as the caching allocator shares no blocks between streams; and it leaves out
the tensors on which DTensor infers shapes, which have no memory on a real rank either.

FSDP1 also calls `record_stream`, after which memory comes back once the other stream has caught
up; here that is at once.

NCCL's buffers are left out, because they are outside the allocator, and so is time. FSDP2 keeps a
collective's buffers by reference until the event that ends it has been waited for, and calls no
`record_stream`, so when memory is freed does not depend on how streams overlap. All streams that
the user's code makes are one. The model is taken to have been made on `meta`, or sharded block by
block: whole parameters are never counted.

Invariant: a process that has no process group has none afterwards, whatever happens.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from autobatch.devices.virtual.sharding.recorder import RankRecorder
from autobatch.devices.virtual.sharding.streams import Streams
from autobatch.errors import UsageError
from autobatch.support.patching import patched
from autobatch.support.torch_private import Fsdp2, fsdp2, unset_fake_temporarily
from autobatch.support.wording import for_reader, given

__all__ = ["as_rank_zero"]

_CARD = torch.device("cuda", 0)
_GENERATOR_STATE_BYTES = 16
"""Of a generator on CUDA: a seed and an offset."""


@contextlib.contextmanager
def as_rank_zero(world_size: int, device: torch.device) -> Iterator[RankRecorder]:
    """Be rank 0 of a fake process group, on a device with FSDP2's streams; give its recorder.

    Enter it before `emulated_cuda`, which replaces lists that the modules imported here add to.

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
            "of its own, and sharding is simulated in another: ask before init_process_group"
            + for_reader(", with isolate=True, or on the command line", "")
        )
    import torch.distributed.fsdp
    import torch.distributed.tensor

    private = fsdp2()
    c10d: Any = dist
    module = getattr(torch, device.type)
    streams = Streams(module)
    recorder = RankRecorder(streams.number)
    hook = sys.excepthook  # replaced by init_process_group, which prefixes every line
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "excepthook", hook)
        stack.callback(private.set_global_rank, -1)
        dist.init_process_group(
            f"cpu:fake,{device.type}:fake",
            store=c10d.HashStore(),
            rank=0,
            world_size=world_size,
        )
        stack.callback(dist.destroy_process_group)
        # otherwise C++ warns that it knows no backend for a device without a type
        c10d.group.WORLD._set_default_backend(c10d.ProcessGroup.BackendType.CUSTOM)
        if device.type != "cuda":
            stack.enter_context(patched(module, **streams.answers()))
        for target, replacements in _replacements(private, recorder, device, world_size):
            stack.enter_context(patched(target, **replacements))
        yield recorder


def _replacements(
    private: Fsdp2, recorder: RankRecorder, device: torch.device, world_size: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield what to replace in PyTorch: where, and by what."""
    from torch.distributed import device_mesh

    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        return recorder.resized(storage, lambda: resize(storage, size))

    yield torch.UntypedStorage, {"resize_": resized}

    infer = private.propagator._propagate_tensor_meta_non_cached

    def inferred(propagator: Any, *args: Any) -> Any:
        with recorder.muted():
            return infer(propagator, *args)

    yield private.propagator, {"_propagate_tensor_meta_non_cached": inferred}

    collectives = {
        name: _gathering(recorder, collective) for name, collective in private.collectives.items()
    }
    # labels for profilers would take a tenth of the time
    unlabelled = {"record_function": lambda *_: contextlib.nullcontext()}
    yield private.param_group, {**collectives, **unlabelled}

    yield from _random_states(private, device)
    checks = getattr(private.checkpoint, private.saved_checks)
    one_name = {**checks, "default": _with_one_name(checks["default"])}
    yield private.checkpoint, {private.saved_checks: one_name}
    yield nn.parallel.DistributedDataParallel, {"__init__": _refuse_replicas}

    # the original compares addresses, which fake tensors do not have
    yield private.flat_parameters, {"_same_storage": _share_a_storage}

    mesh_class: Any = device_mesh.DeviceMesh
    make = mesh_class.__init__

    def made(mesh: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        # FSDP2 makes one of two for parameters that a tensor parallel plan split, and reads ranks
        with unset_fake_temporarily():
            make(mesh, device.type if device_type == "cuda" else device_type, *args, **kwargs)

    yield mesh_class, {"__init__": made}
    # init_device_mesh takes no device type with an underscore
    default_mesh = {private.default_mesh: lambda: mesh_class(device.type, range(world_size))}
    yield private.fully_shard, default_mesh


def _random_states(private: Fsdp2, device: torch.device) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield what lets DTensor draw random numbers on a device that has no generator.

    On CUDA the state of a generator is in host memory. DTensor's tracker of it, made for the first
    draw, copies it to the device to compare it with that of rank 0; in some versions of PyTorch
    each draw copies it too. The copies are made here as well. Where in the sequence of numbers a
    rank begins is left out: it takes no memory.
    """
    tracker_class = private.random.OffsetBasedRNGTracker
    make = tracker_class.__init__

    def made(tracker: Any, mesh: Any, *_: bool, run_state_sync: bool = True) -> None:
        # by position DTensor says no because fake tensors are about, which they are not on CUDA
        make(tracker, mesh, run_state_sync=False)
        if run_state_sync:
            received = tracker._get_device_state()
            torch.eq(tracker._get_device_state(), received)  # the answer is in memory, too

    def copied(tracker: Any) -> torch.Tensor:
        return torch.empty(_GENERATOR_STATE_BYTES, dtype=torch.uint8, device=device)

    yield tracker_class, {"__init__": made, "_get_device_state": copied}
    never = property(lambda tracker: False, lambda tracker, value: None)
    yield private.random._RNGStateTracker, {"distribute_region_enabled": never}
    yield private.random, {"_rng_tracker": None}


def _with_one_name(extract: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Let the device have one name in what checkpointing compares.

    A DTensor says that it is on CUDA to the user's code, and where it is to PyTorch's.
    """

    def extracted(tensor: Any) -> dict[str, Any]:
        told = extract(tensor)
        return told if told["device"].type == "cpu" else {**told, "device": _CARD}

    return extracted


def _refuse_replicas(*args: Any, **kwargs: Any) -> None:
    raise UsageError(
        "DistributedDataParallel is not run over GPUs that are not there: leave the model "
        f"unwrapped and use {given('sharding', 'ddp')}, which counts its buckets of gradients"
    )


def _share_a_storage(tensor: Any, other: Any) -> bool:
    from torch.distributed.tensor import DTensor

    first, second = (
        one._local_tensor if isinstance(one, DTensor) else one for one in (tensor, other)
    )
    return bool(first.untyped_storage()._cdata == second.untyped_storage()._cdata)


def _gathering(recorder: RankRecorder, collective: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with recorder.gathering():
            return collective(*args, **kwargs)

    return run
