"""CUDA played on the CPU: real tensors and arithmetic, the allocator simulated, with a limit.

It takes the place of `autobatch.devices.cuda.runtime.CudaRuntime`, so that everything above runs as
on a real GPU.
"""

from __future__ import annotations

import contextlib
import time
import traceback
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autobatch.devices import choose
from autobatch.devices.cuda.op_names import Made
from autobatch.devices.cuda.runtime import Stats
from autobatch.gpus.budget import DeviceReading
from autobatch.memory.allocator import CachingAllocator, OutOfMemory
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.snapshot import Frame, Snapshot, TraceEvent
from autobatch.support.patching import patched

MIB = 2**20


class WallClock:
    def __init__(self):
        self._start = time.perf_counter()

    def seconds(self):
        return time.perf_counter() - self._start


class CudaOnCpu:
    """Counts what tensors made while recording would take.

    Args:
        capacity_bytes, context_bytes, others_bytes: of the card.
        allowed_bytes: the process's fraction.
        scratch: `scratch(op name, argument shapes)` gives bytes that the op's kernel takes for its
            own while it runs.
        knows_own: whether the driver tells what this process holds.
    """

    clock = WallClock
    index = 0
    device = torch.device("cpu")
    name = "rehearsed"
    capability = (8, 0)

    def __init__(
        self,
        capacity_bytes=256 * MIB,
        *,
        context_bytes=16 * MIB,
        others_bytes=0,
        allowed_bytes=None,
        scratch=lambda name, shapes: 0,
        knows_own=True,
    ):
        self.capacity_bytes = capacity_bytes
        self.context_bytes = context_bytes
        self.others_bytes = others_bytes
        self.allowed_bytes = allowed_bytes
        self.scratch = scratch
        self.knows_own = knows_own
        left = capacity_bytes - context_bytes - others_bytes
        limit = left if allowed_bytes is None else min(left, allowed_bytes)
        self.limit_bytes = limit
        self.allocator = CachingAllocator(limit_bytes=limit)
        self.ooms = 0
        self.calls = 0
        self.events = []
        self.is_recording = False
        self.peaks = [0, 0]
        self.requested_bytes = 0
        self.known = {}
        self.running = ""
        self.ops = None

    def selected(self):
        return contextlib.nullcontext()

    def reading(self):
        reserved = self.allocator.reserved_bytes
        held = self.context_bytes + self.others_bytes + reserved
        return DeviceReading(
            capacity_bytes=self.capacity_bytes,
            free_bytes=max(self.capacity_bytes - held, 0),
            reserved_bytes=reserved,
            allowed_bytes=self.allowed_bytes,
            own_bytes=self.context_bytes + reserved if self.knows_own else None,
        )

    def stats(self):
        return Stats(
            requested_bytes=self.requested_bytes,
            allocated_bytes=self.allocator.allocated_bytes,
            reserved_bytes=self.allocator.reserved_bytes,
            peak_allocated_bytes=self.peaks[0],
            peak_reserved_bytes=self.peaks[1],
            alloc_retries=self.allocator.alloc_retries,
            events=self.calls,
        )

    def reset_peaks(self):
        self.peaks = [self.allocator.allocated_bytes, self.allocator.reserved_bytes]

    def empty_cache(self):
        # a card's own thread of autograd drops the nodes that an error left in its queue; on the
        # CPU they wait there, with their tensors, for the next backward
        torch.zeros((), requires_grad=True).clone().backward()
        self.allocator.empty_cache()

    def raise_peaks(self, *, allocated_bytes, reserved_bytes):
        held = [self.allocator.allocated_bytes, self.allocator.reserved_bytes]
        if held[1] + reserved_bytes > self.limit_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.peaks = [
            max(peak, now + more)
            for peak, now, more in zip(
                self.peaks, held, (allocated_bytes, reserved_bytes), strict=True
            )
        ]

    @contextlib.contextmanager
    def recording(self, *, stacks=False):
        self.is_recording = True
        self.stacks = stacks
        self.events = []
        try:
            with _Ledger(self):
                yield
        finally:
            self.is_recording = False

    @contextlib.contextmanager
    def naming_ops(self, running):
        self.ops, self.modules = [], running
        yield self.ops
        self.ops = None

    def snapshot(self, *, stacks=False):
        return Snapshot(
            segments={0: ()}, traces={0: tuple(self.events)}, settings=AllocatorSettings()
        )

    def malloc(self, address, size_bytes, tensors=()):
        try:
            block = self.allocator.malloc(size_bytes)
        except OutOfMemory as error:
            self.ooms += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size_bytes} bytes. GPU 0 has a total "
                f"capacity of {self.capacity_bytes} bytes"
            ) from error
        self.peaks[0] = max(self.peaks[0], self.allocator.allocated_bytes)
        self.peaks[1] = max(self.peaks[1], self.allocator.reserved_bytes)
        self.requested_bytes += size_bytes
        self._note("alloc", address, size_bytes)
        if self.ops is not None:
            self.ops.append(Made(self.running, self.modules.name(), tensors))
        return block

    def free(self, address, block, size_bytes):
        self.allocator.free(block)
        self.requested_bytes -= size_bytes
        self._note("free_requested", address, size_bytes)

    def _note(self, action, address, size_bytes):
        self.calls += 1
        if self.is_recording:
            stack = _stack() if self.stacks else ()
            self.events.append(TraceEvent(action, address, size_bytes, 0, stack=stack))


class _Ledger(TorchDispatchMode):
    """Puts the storages that ops make into the card's allocator, and takes them out again."""

    def __init__(self, card):
        super().__init__()
        self.card = card
        self.known = card.known

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for leaf in inputs:
            self._see(leaf, is_new=False)
        self.card.running = func._schema.name
        scratch = self.card.scratch(func._schema.name, [tuple(leaf.shape) for leaf in inputs])
        output = func(*args, **(kwargs or {}))
        borrows = func._schema.name == "aten::set_"  # the host copy of something
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self._see(leaf, is_new=not borrows)
        if scratch:
            self.card.free(1, self.card.malloc(1, scratch), scratch)
        self.card.running = ""
        return output

    def _see(self, tensor, *, is_new):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size, address = storage.nbytes(), storage.data_ptr()
        made = ((tuple(tensor.shape), tensor.dtype),)
        block = self.card.malloc(address, size, made) if is_new and size else None

        def gone(_):
            if self.known.get(key) is reference:
                del self.known[key]
            if block is not None:
                self.card.free(address, block, size)

        self.known[key] = reference = weakref.ref(storage, gone)


def _stack():
    """The lines of Python that run, as PyTorch's memory history records them."""
    stack = traceback.StackSummary.extract(traceback.walk_stack(None), lookup_lines=False)
    frames = (Frame(frame.name, frame.filename, frame.lineno) for frame in stack)
    return tuple(frame for frame in frames if frame.filename != __file__)


@contextlib.contextmanager
def installed(card):
    """Let `tune` without a `gpu` find this card in the machine."""
    with patched(choose, CudaRuntime=lambda index: card, _cuda_index=lambda gpu: 0):
        yield card
