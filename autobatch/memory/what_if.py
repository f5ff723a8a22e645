"""The requests of a recording under other settings of the allocator, or in an empty cache.

Invariant: requests, frees and their order are the recorded ones; only blocks and segments differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from autobatch.memory.allocator import CachingAllocator, OutOfMemory
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.blocks import SegmentInfo
from autobatch.memory.recording import Recording
from autobatch.memory.segments import Block
from autobatch.memory.snapshot import Stack, TraceEvent

__all__ = ["Outcome", "Releaser", "releases", "rerun"]

_RELEASES = ("segment_free", "segment_unmap")
_MAKES = ("segment_alloc", "segment_map")
_EMPTIES = ("empty_cache", "THCPModule_emptyCache(_object*, _object*)")
_TRIED = -1  # no address: a block that is freed at once

Releaser = Literal["program", "allocator", "either"]
"""Who gave cached memory back: `torch.cuda.empty_cache()`, a request that found no memory, or one
of the two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the allocator did with the recorded requests.

    Attributes:
        peak_reserved_bytes, peak_allocated_bytes: most bytes in segments, and in blocks in use.
        alloc_retries: how often everything cached had to be released to satisfy a request.
        failed_event: the recorded request that could not be met; None if all could.
        refused: of the requests that failed in the recording, those that fail here, too.
    """

    peak_reserved_bytes: int
    peak_allocated_bytes: int
    alloc_retries: int
    failed_event: int | None
    refused: tuple[int, ...]


def releases(recording: Recording) -> dict[int, Releaser]:
    """Return the events with which cached memory began to be given back, and who did it.

    A request that finds no memory gives back what is cached and tries again, so that a new segment
    or the failure follows at once; so it does when a program empties the cache and goes on. The
    stack tells them apart. Without one, memory cannot have been short if as much as the request
    needed was reserved at another time.
    """
    events = recording.events
    reserved = _reserved_before(recording)
    most = max(reserved)
    told = _stacks_of_frees_are_kept(events)
    found: dict[int, Releaser] = {}
    index = 0
    while index < len(events):
        if events[index].action not in _RELEASES:
            index += 1
            continue
        first = index
        while index < len(events) and events[index].action in _RELEASES:
            index += 1
        new_bytes = 0
        following = index
        while following < len(events) and events[following].action in _MAKES:
            new_bytes += events[following].size_bytes
            following += 1
        fails = following < len(events) and events[following].action == "oom"
        if told and events[first].stack:
            by_program = any(f.name in _EMPTIES for f in events[first].stack)
            found[first] = "program" if by_program else "allocator"
        elif fails:
            found[first] = "allocator"
        elif not new_bytes or reserved[first] + new_bytes <= most:
            found[first] = "program"
        else:
            found[first] = "either"
    return found


def _reserved_before(recording: Recording) -> list[int]:
    """Return the bytes in segments before each event, and after the last one."""
    reserved = [sum(part.size_bytes for part in recording.start)]
    for event in recording.events:
        change = 0
        if event.action in _MAKES:
            change = event.size_bytes
        elif event.action in _RELEASES:
            change = -event.size_bytes
        reserved.append(reserved[-1] + change)
    return reserved


def _stacks_of_frees_are_kept(events: Sequence[TraceEvent]) -> bool:
    """Say whether frees have stacks of their own; else PyTorch repeats those of the allocations."""
    born: dict[int, Stack] = {}
    for event in events:
        if event.action == "alloc":
            born[event.address] = event.stack
        elif event.action == "free_requested":
            stack = born.get(event.address, event.stack)
            if event.stack and event.stack is not stack:  # equal stacks are one object
                return True
    return False


def rerun(
    recording: Recording,
    settings: AllocatorSettings,
    *,
    released: Mapping[int, Releaser],
    start: Sequence[SegmentInfo] | None = None,
    capacity_bytes: int | None = None,
) -> Outcome:
    """Make the recorded requests of an allocator.

    Args:
        recording: the events, and the blocks that are alive before them.
        settings: of the allocator.
        released: who gave cached memory back, as `releases` says.
        start: segments to begin with; None to begin with nothing and to place the blocks that are
            alive before the first event anew, in the order of their addresses.
        capacity_bytes: what CUDA can give in all; unlimited if None.
    """
    if start is None:
        run = _Rerun(CachingAllocator(settings, capacity_bytes=capacity_bytes))
    else:
        run = _Rerun(CachingAllocator.from_segments(start, settings, capacity_bytes=capacity_bytes))
    emptied = {index for index, by in released.items() if by != "allocator"}
    refused: list[int] = []
    event_index = -1
    try:
        run.take_over(recording.start, placed=start is not None)
        for event_index, event in enumerate(recording.events):
            match event.action:
                case "alloc":
                    run.allocate(event.address, event.size_bytes, event.stream, event.pool_id)
                case "oom":
                    if not run.could_allocate(event):
                        refused.append(event_index)
                case "free_requested":
                    run.request_free(event.address)
                case "free_completed":
                    run.complete_free(event.address)
                case "segment_free" | "segment_unmap" if event_index in emptied:
                    run.empty_cache()
    except OutOfMemory:
        return _outcome(run.allocator, event_index, refused)
    return _outcome(run.allocator, None, refused)


class _Rerun:
    """An allocator, and which of its blocks stands for the one at a recorded address."""

    def __init__(self, allocator: CachingAllocator) -> None:
        self.allocator = allocator
        self._live: dict[int, Block] = {}
        self._waiting: dict[int, Block] = {}  # their free was requested

    def take_over(self, start: Sequence[SegmentInfo], *, placed: bool) -> None:
        """Begin with the blocks of a state, which are in the allocator already or placed anew."""
        for part in start:
            for info in part.blocks:
                if info.state == "free":
                    continue
                if placed:
                    block = self.allocator.block_at(info.address)
                    assert block is not None  # the allocator began with this state
                    (self._live if info.state == "allocated" else self._waiting)[info.address] = (
                        block
                    )
                    continue
                self.allocate(info.address, info.requested_bytes, part.stream, part.pool_id)
                if info.state == "awaiting_free":
                    self.request_free(info.address)

    def allocate(self, address: int, size: int, stream: int, pool_id: tuple[int, int]) -> None:
        retries = self.allocator.alloc_retries
        try:
            self._live[address] = self.allocator.malloc(size, stream, pool_id)
        finally:
            if self.allocator.alloc_retries != retries:
                self._waiting.clear()  # it waited for all of them

    def could_allocate(self, event: TraceEvent) -> bool:
        """Make a request that failed in the recording; free the block at once if it works."""
        try:
            self.allocate(_TRIED, event.size_bytes, event.stream, event.pool_id)
        except OutOfMemory:
            return False
        self.allocator.free(self._live.pop(_TRIED))
        return True

    def request_free(self, address: int) -> None:
        block = self._live.pop(address, None)
        if block is not None:
            self.allocator.request_free(block)
            self._waiting[address] = block

    def complete_free(self, address: int) -> None:
        self.request_free(address)  # where a recording does not tell of the request
        block = self._waiting.pop(address, None)
        if block is not None:
            self.allocator.complete_free(block)

    def empty_cache(self) -> None:
        self.allocator.empty_cache()
        self._waiting.clear()


def _outcome(allocator: CachingAllocator, failed: int | None, refused: list[int]) -> Outcome:
    return Outcome(
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        peak_allocated_bytes=allocator.peak_allocated_bytes,
        alloc_retries=allocator.alloc_retries,
        failed_event=failed,
        refused=tuple(refused),
    )
