"""Run a recording through the simulated allocator, one event at a time.

Invariant: every allocation is decided by the simulation, from the state that the recording was
in; where the two differ, the difference is counted and the recorded state is restored, so one
difference is one count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from autobatch.memory.allocator import CachingAllocator
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.recording import MemoryMap, Recording
from autobatch.memory.segments import Block, Pool
from autobatch.memory.snapshot import TraceEvent

__all__ = ["RecordedRun"]


class _DifferenceError(Exception):
    """The simulation did something that the recording did not."""


class _RecordedDriver(CachingAllocator):
    """The allocator with the driver's answers taken from a recording."""

    def expect(self, made: Iterable[TraceEvent], address: int, *, from_cache: bool) -> None:
        """Name the segments that were made for the next allocation.

        Args:
            made: in order.
            address: where the allocation was recorded. It decides between free blocks of one size:
                PyTorch 2.11 took the lowest address, 2.12 and 2.14 go by the age of blocks or of
                their segments (pull requests 183489 and 183591), which recordings need not show.
            from_cache: whether the allocation may be served by a block that is free already.
        """
        self._address = address
        self.expected = deque(made)
        self.confirmed = 0
        self.tied = False
        self._from_cache = from_cache
        self._selective = True

    def _select(self, pool: Pool, size: int, index: int) -> int:
        free = pool.free
        if not self._from_cache:
            return len(free)
        index = super()._select(pool, size, index)
        if index < len(free):
            size_bytes = free[index].size_bytes
            recorded = pool.place(size_bytes, self._address)
            is_tied = (
                recorded < len(free)
                and free[recorded].address == self._address
                and free[recorded].size_bytes == size_bytes
            )
            if recorded != index and is_tied:
                self.tied = True
                return recorded
        return index

    def cuda_malloc(self, size_bytes: int) -> int | None:
        return self._confirm(size_bytes).address

    def cuda_reserve(self, size_bytes: int) -> int:
        if not self.expected:
            raise _DifferenceError("a new segment is made, none was recorded")
        return self.expected[0].address

    def cuda_map(self, address: int, size_bytes: int) -> bool:
        event = self._confirm(size_bytes)
        if event.address != address:
            raise _DifferenceError(f"pages mapped at {address:#x}, recorded {event.address:#x}")
        return True

    def _confirm(self, size_bytes: int) -> TraceEvent:
        if not self.expected:
            raise _DifferenceError("a new segment is made, none was recorded")
        event = self.expected.popleft()
        if event.size_bytes != size_bytes:
            raise _DifferenceError(f"new segment of {size_bytes} B, recorded {event.size_bytes} B")
        self.confirmed += 1
        return event


class RecordedRun:
    """A replay in progress: the simulation, the recorded state beside it, and the counts.

    Attributes:
        allocator: the simulation, in the state that the recording has after the last step.
        blocks, blocks_matched: allocations, and those served by the recorded block.
        ties: of those, how many the recording decides between free blocks of one size.
        segments_matched: new segments (or mapped ranges) that the simulation made for the same
            allocation in the same size.
        segments_unused: those that no allocation followed at once.
        releases_matched: segments (or ranges) given back that were wholly free in the simulation.
        first_difference: the first event that differed, in words.
    """

    def __init__(self, recording: Recording, settings: AllocatorSettings) -> None:
        """Begin before the first event of a rewound recording."""
        self.settings = settings
        self.memory = MemoryMap(recording.start)
        self.made: list[TraceEvent] = []  # segments recorded since the last allocation
        self.requested: int | None = None  # address of the latest requested free
        self.late = False  # since the program's last action, a free that waited has ended
        self.released = False  # since then, a segment was given back
        self.blocks = self.blocks_matched = self.ties = 0
        self.segments_matched = self.segments_unused = self.releases_matched = 0
        self.first_difference: str | None = None
        self._restore()

    def _restore(self) -> None:
        """Put the simulation into the recorded state."""
        self.allocator = _RecordedDriver.from_segments(
            self.memory.segments(self.settings), self.settings
        )

    def step(self, index: int, event: TraceEvent) -> None:
        """Replay one event."""
        match event.action:
            case "segment_alloc" | "segment_map":
                self.made.append(event)
                self.memory.apply(event)
            case "alloc":
                self.blocks += 1
                self._allocate(index, event)
                self.made = []
                self.late = self.released = False
            case "free_requested" | "free_completed":
                self._keep_unused_segments()
                self._free(event)
            case "segment_free" | "segment_unmap":
                self._keep_unused_segments()
                self._release(index, event)
            case "oom":
                self._keep_unused_segments()

    def _allocate(self, index: int, event: TraceEvent) -> None:
        """Let the simulation choose, and compare block and new segments with the recorded ones."""
        try:
            try:
                block = self._choose(event)
            except _DifferenceError:
                if not (self.late and self.released):
                    raise
                block = self._choose_after_retry(event)
        except _DifferenceError as error:
            self.segments_matched += self.allocator.confirmed
            self._differ(index, event, str(error))
            self.memory.apply(event)
            self._restore()
            return
        self.memory.apply(event, block.size_bytes)
        self.blocks_matched += 1
        self.ties += self.allocator.tied
        self.segments_matched += len(self.made)

    def _choose(self, event: TraceEvent, *, from_cache: bool = True) -> Block:
        """Let the simulation choose a block.

        Raises:
            _DifferenceError: it is not the recorded one, or other segments were made for it.
        """
        allocator = self.allocator
        allocator.expect(self.made, event.address, from_cache=from_cache)
        block = allocator.malloc(event.size_bytes, event.stream, event.pool_id)
        if allocator.expected:
            raise _DifferenceError(f"block at {block.address:#x}, recorded a new segment")
        if block.address != event.address:
            raise _DifferenceError(f"block at {block.address:#x}, recorded {event.address:#x}")
        return block

    def _choose_after_retry(self, event: TraceEvent) -> Block:
        """Let the simulation make a new segment, whichever blocks are free.

        A failed `cudaMalloc` ends all waiting frees and releases segments, but PyTorch does not
        look at the cached blocks again before it calls `cudaMalloc` once more.
        """
        for made in reversed(self.made):
            self.memory.undo(made)
        self._restore()
        for made in self.made:
            self.memory.apply(made)
        return self._choose(event, from_cache=False)

    def _free(self, event: TraceEvent) -> None:
        block = self.allocator.block_at(event.address)
        assert block is not None  # the recording agrees with itself, and the state was restored
        if event.action == "free_requested":
            self.allocator.request_free(block)
            self.requested = event.address
            self.late = self.released = False
        else:
            if not block.awaits:
                self.allocator.request_free(block)
            self.allocator.complete_free(block)
            self.late |= event.address != self.requested
        self.memory.apply(event)

    def _release(self, index: int, event: TraceEvent) -> None:
        self.memory.apply(event)
        self.released = True
        block = self.allocator.block_at(event.address)
        try:
            if block is None:
                raise ValueError("nothing is there")
            if self.allocator.release(block) != (event.address, event.size_bytes):
                raise ValueError("another range was released")
            self.releases_matched += 1
        except ValueError as error:
            self._differ(index, event, str(error))
            self._restore()

    def _keep_unused_segments(self) -> None:
        """Take over segments that no allocation followed, such as pages mapped before an OOM."""
        if self.made:
            self.segments_unused += len(self.made)
            self.made = []
            self._restore()

    def _differ(self, index: int, event: TraceEvent, reason: str) -> None:
        if self.first_difference is None:
            self.first_difference = (
                f"event {index}, {event.action} of {event.size_bytes} B at {event.address:#x}: "
                + reason
            )
