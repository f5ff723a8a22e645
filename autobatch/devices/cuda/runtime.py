"""One CUDA device of this machine, as far as a probe needs it.

Invariant: all calls of PyTorch's CUDA memory functions in `devices` are here, so that tests replace
one class to play CUDA on the CPU. What is changed here can be changed back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from autobatch.devices.cuda.op_names import Made, op_of_each_allocation
from autobatch.devices.running_module import RunningModule
from autobatch.errors import UsageError
from autobatch.gpus import nvml
from autobatch.gpus.budget import DeviceReading
from autobatch.memory.snapshot import Snapshot, read_snapshot
from autobatch.support.torch_private import (
    clear_cublas_workspaces,
    is_memory_history_on,
    memory_snapshot,
    record_memory_history,
)
from autobatch.support.units import MIB

__all__ = ["Clock", "CudaRuntime", "Stats"]

_SIDE_STREAMS = 30
"""PyTorch has 32 side streams and gives them out in turn."""

_BULK, _PIECE, _SMALLEST = 20 * MIB, MIB, 512
"""Sizes that the allocator serves without a remainder: segments of large blocks are multiples of
2 MiB, expandable ones of 20 MiB; small blocks end at 1 MiB and are cut to multiples of 512 B."""

MAX_EVENTS = 1_000_000
"""Allocator events that are kept, at about 150 B each; a window has some ten thousand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The allocator's counters; names as in `torch.cuda.memory_stats`, all pools together.

    `events` counts allocations and requested frees since the process began. `requested_bytes` is
    what the owners of allocated blocks asked for: a block of the cache may be larger by 1 MiB.
    """

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    alloc_retries: int
    events: int


class Clock:
    """Measures seconds by the GPU's own time."""

    def __init__(self) -> None:
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._start.record()

    def seconds(self) -> float:
        """Wait for the GPU, and return the seconds since the clock was made."""
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1000


class CudaRuntime:
    """One CUDA device."""

    clock = Clock

    def __init__(self, index: int | None = None):
        """Open a device, the current one if no index is given; this makes its CUDA context.

        Raises:
            UsageError: the allocator is not PyTorch's native one, and shows no segments.
        """
        torch.cuda.init()
        self.index = torch.cuda.current_device() if index is None else index
        self.device = torch.device("cuda", self.index)
        properties = torch.cuda.get_device_properties(self.index)
        self.name: str = properties.name
        self.capability = (properties.major, properties.minor)
        self._uuid = str(getattr(properties, "uuid", ""))
        self._pci_bus_id = "{:08x}:{:02x}:{:02x}.0".format(
            *(getattr(properties, f"pci_{part}_id", 0) for part in ("domain", "bus", "device"))
        )
        if torch.cuda.get_allocator_backend() != "native":
            raise UsageError(
                f"the CUDA allocator is {torch.cuda.get_allocator_backend()!r}, which shows no "
                "segments: probe with PyTorch's native one (unset backend: in "
                "PYTORCH_CUDA_ALLOC_CONF)"
            )

    def selected(self) -> contextlib.AbstractContextManager[None]:
        """Make this the current device for the length of a block."""
        return torch.cuda.device(self.index)

    def reading(self) -> DeviceReading:
        """Read how much of the GPU's memory is free, and who holds the rest."""
        torch.cuda.synchronize(self.index)
        free, total = torch.cuda.mem_get_info(self.index)
        fraction = torch.cuda.get_per_process_memory_fraction(self.index)
        occupancy = nvml.occupancy(self._uuid, self._pci_bus_id, os.getpid())
        return DeviceReading(
            capacity_bytes=total,
            free_bytes=free,
            reserved_bytes=torch.cuda.memory_reserved(self.index),
            allowed_bytes=int(fraction * total) if fraction < 1 else None,
            own_bytes=occupancy.own_bytes if occupancy else None,
            parent_bytes=_parent_bytes(occupancy),
        )

    def stats(self) -> Stats:
        """Read the allocator's counters."""
        stats = torch.cuda.memory_stats_as_nested_dict(self.index)
        calls = stats["allocation"]["all"]
        return Stats(
            requested_bytes=stats["requested_bytes"]["all"]["current"],
            allocated_bytes=stats["allocated_bytes"]["all"]["current"],
            reserved_bytes=stats["reserved_bytes"]["all"]["current"],
            peak_allocated_bytes=stats["allocated_bytes"]["all"]["peak"],
            peak_reserved_bytes=stats["reserved_bytes"]["all"]["peak"],
            alloc_retries=stats["num_alloc_retries"],
            events=calls["allocated"] + calls["freed"],
        )

    def reset_peaks(self) -> None:
        """Reset the peaks to what is allocated and reserved now."""
        torch.cuda.reset_peak_memory_stats(self.index)

    def empty_cache(self) -> None:
        """Give the workspaces of libraries, then all free segments, back to the driver.

        cuBLAS and cuFFT take workspaces from the allocator and keep them. Without them every run
        begins as a new process does; a library takes its own again when it needs it.
        """
        torch.cuda.synchronize(self.index)
        clear_cublas_workspaces()
        torch.backends.cuda.cufft_plan_cache[self.index].clear()
        torch.cuda.empty_cache()

    def raise_peaks(self, *, allocated_bytes: int, reserved_bytes: int) -> None:
        """Let the peaks be this much above what is allocated and reserved now.

        Memory is allocated and freed for that, on streams that nothing else uses: none of the free
        blocks of other streams serves it, so that it is in segments of exactly its size. Where it
        was freed, it stays reserved, and the next stream's comes on top.

        Raises:
            torch.OutOfMemoryError: there is no longer so much.
        """
        reserved = torch.cuda.memory_reserved(self.index)
        self._hold_for_a_moment(allocated_bytes)
        for _ in range(_SIDE_STREAMS):
            missing = reserved + reserved_bytes - torch.cuda.memory_reserved(self.index)
            if missing <= 0 or allocated_bytes < _SMALLEST:
                break
            self._hold_for_a_moment(min(allocated_bytes, missing))

    def _hold_for_a_moment(self, size_bytes: int) -> None:
        """Allocate memory on a stream of its own, and free it."""
        bulk = size_bytes // _BULK * _BULK
        rest = size_bytes - bulk
        pieces = [bulk] * (bulk > 0) + [_PIECE] * (rest // _PIECE)
        pieces += [rest % _PIECE] * (rest % _PIECE > 0)
        with torch.cuda.stream(torch.cuda.Stream(self.index)):
            held = [torch.empty(n, dtype=torch.uint8, device=self.device) for n in pieces]
            held.clear()

    @property
    def is_recording(self) -> bool:
        """Whether PyTorch's memory history is on."""
        return is_memory_history_on()

    @contextlib.contextmanager
    def recording(self, *, stacks: bool = False) -> Iterator[None]:
        """Record every allocator event; `snapshot` shows them until the end.

        With `stacks`, the lines of Python that allocate are recorded as well.
        """
        record_memory_history(
            "all",
            context="alloc" if stacks else None,
            stacks="python",
            max_entries=MAX_EVENTS,
            device=self.index,
        )
        try:
            yield
        finally:
            record_memory_history(None, device=self.index)

    def naming_ops(self, running: RunningModule) -> contextlib.AbstractContextManager[list[Made]]:
        """Return a block after which a list has what made every allocation in it, in order.

        Ops run as they do without: PyTorch's profiler looks on.
        """
        return op_of_each_allocation(self.device, running)

    def snapshot(self, *, stacks: bool = False) -> Snapshot:
        """Return the allocator's state, and its events since recording began."""
        torch.cuda.synchronize(self.index)
        return read_snapshot(memory_snapshot(self.index), stacks=stacks)


def _parent_bytes(occupancy: nvml.Occupancy | None) -> int:
    """Return what the process that started this one holds on the GPU, as far as that is known."""
    others = (occupancy.other_processes if occupancy else None) or ()
    return next((each.used_bytes or 0 for each in others if each.pid == os.getppid()), 0)
