"""Undoes a snapshot's trace, so that it can be replayed from its beginning.

Invariant: rewinding uses only addresses and requested sizes, none of the allocator's rules, so that
where it stops, the recording contradicts itself. It infers two things: how far a block reaches
beyond its request, and where an expandable segment begins.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.blocks import (
    DEFAULT_POOL,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
    BlockInfo,
    BlockState,
    SegmentInfo,
    round_size,
)
from autobatch.memory.snapshot import Snapshot, TraceEvent

__all__ = ["MemoryMap", "Recording", "rewind"]

_ANYWHERE = 1 << 64


class _ContradictionError(Exception):
    """An event cannot have happened in the state that the recording leads to."""


@dataclass(slots=True)
class _Range:
    """Memory between `address` and `end`; `small` is None until a block in it shows the kind."""

    address: int
    end: int
    stream: int
    small: bool | None
    pool_id: tuple[int, int]
    expandable: bool


@dataclass(slots=True)
class _Live:
    """A block in use.

    `size_bytes`, with rounding, is None where the recording does not show it. `reach` then limits
    it: the lowest address at which another block began behind this one while both were in use.
    """

    requested_bytes: int
    state: BlockState
    size_bytes: int | None
    reach: int


class MemoryMap:
    """The segments and live blocks at one event, moved forwards or backwards along the trace."""

    def __init__(self, segments: Sequence[SegmentInfo]) -> None:
        """Start at the state that these segments show."""
        self._ranges = {
            part.address: _Range(
                part.address,
                part.address + part.size_bytes,
                part.stream,
                part.small,
                part.pool_id,
                part.expandable,
            )
            for part in segments
        }
        self._range_starts = sorted(self._ranges)
        self._live = {
            block.address: _Live(block.requested_bytes, block.state, block.size_bytes, _ANYWHERE)
            for part in segments
            for block in part.blocks
            if block.state != "free"
        }
        self._live_starts = sorted(self._live)
        # Where the expandable segment of a stream, private pool and kind is known to begin.
        self._bases: dict[tuple[int, tuple[int, int], bool], int] = {}
        for part in segments:
            if part.reserved_from is not None:
                self._bases[part.stream, part.pool_id, part.small] = part.reserved_from

    def apply(self, event: TraceEvent, block_bytes: int | None = None) -> None:
        """Let an event happen; `block_bytes` is the rounded size of an allocation, if known."""
        match event.action:
            case "alloc":
                self._occupy(event, "allocated", block_bytes)
            case "free_requested":
                self._live[event.address].state = "awaiting_free"
            case "free_completed":
                self._vacate(event)
            case "segment_alloc" | "segment_map":
                self._add_range(event)
            case "segment_free" | "segment_unmap":
                self._remove_range(event)

    def undo(self, event: TraceEvent) -> None:
        """Take back the latest event."""
        match event.action:
            case "alloc":
                self._vacate(event)
            case "free_requested":
                block = self._live.get(event.address)
                if block is None or block.state != "awaiting_free":
                    raise _ContradictionError("no free is under way there afterwards")
                block.state = "allocated"
            case "free_completed":
                self._occupy(event, "awaiting_free", None)
            case "segment_alloc" | "segment_map":
                self._remove_range(event)
            case "segment_free" | "segment_unmap":
                self._add_range(event)

    def pool_id(self, address: int) -> tuple[int, int]:
        """Return the owner of the segment that holds an address."""
        index = bisect_right(self._range_starts, address) - 1
        part = self._ranges[self._range_starts[index]] if index >= 0 else None
        return part.pool_id if part and address < part.end else DEFAULT_POOL

    def segments(self, settings: AllocatorSettings) -> tuple[SegmentInfo, ...]:
        """Return the state as segments of blocks, with sizes rounded as `settings` say."""
        bases = dict(self._bases)
        segments = []
        for run in self._runs(settings):
            segment = self._segment(run, settings)
            if segment.expandable:  # the first one tells for all of its kind
                base = bases.pop((segment.stream, segment.pool_id, segment.small), None)
                if base is not None and base < segment.address:
                    segment = replace(segment, reserved_from=base)
            segments.append(segment)
        return tuple(segments)

    def _occupy(self, event: TraceEvent, state: BlockState, size: int | None) -> None:
        end = event.address + event.size_bytes
        index = bisect_right(self._live_starts, event.address)
        if index:
            before = self._live_starts[index - 1]
            if before == event.address or (
                before + self._live[before].requested_bytes > event.address
            ):
                raise _ContradictionError(f"the block at {before:#x} lives there")
        if index < len(self._live_starts) and self._live_starts[index] < end:
            raise _ContradictionError(f"the block at {self._live_starts[index]:#x} lives there")
        for part in self._cover(event.address, end):
            if part.small is None:
                part.small = event.size_bytes <= SMALL_BYTES
        reach = _ANYWHERE
        if index < len(self._live_starts):
            reach = self._live_starts[index]
        if index:
            neighbour = self._live[self._live_starts[index - 1]]
            neighbour.reach = min(neighbour.reach, event.address)
        self._live_starts.insert(index, event.address)
        self._live[event.address] = _Live(event.size_bytes, state, size, reach)

    def _vacate(self, event: TraceEvent) -> None:
        block = self._live.get(event.address)
        if block is None:
            raise _ContradictionError("no block lives there afterwards")
        if block.requested_bytes != event.size_bytes:
            raise _ContradictionError(f"the block there afterwards has {block.requested_bytes} B")
        for part in self._cover(event.address, event.address + event.size_bytes):
            if part.small is None:
                part.small = event.size_bytes <= SMALL_BYTES
        del self._live[event.address]
        del self._live_starts[bisect_left(self._live_starts, event.address)]

    def _cover(self, start: int, end: int) -> list[_Range]:
        """Return the neighbouring ranges that hold all of [start, end)."""
        index = bisect_right(self._range_starts, start) - 1
        parts: list[_Range] = []
        while index >= 0 and (not parts or parts[-1].end < end):
            if index == len(self._range_starts):
                break
            part = self._ranges[self._range_starts[index]]
            if part.address > (parts[-1].end if parts else start):
                break
            if parts and not part.expandable:
                break
            parts.append(part)
            index += 1
        if not parts or parts[-1].end < end:
            raise _ContradictionError("there is no segment")
        return parts

    def _add_range(self, event: TraceEvent) -> None:
        end = event.address + event.size_bytes
        index = bisect_right(self._range_starts, event.address)
        if index and self._ranges[self._range_starts[index - 1]].end > event.address:
            raise _ContradictionError(f"the segment at {self._range_starts[index - 1]:#x} is there")
        if index < len(self._range_starts) and self._range_starts[index] < end:
            raise _ContradictionError(f"the segment at {self._range_starts[index]:#x} is there")
        self._range_starts.insert(index, event.address)
        self._ranges[event.address] = _Range(
            event.address,
            end,
            event.stream,
            None,
            event.pool_id,
            event.action in ("segment_map", "segment_unmap"),
        )

    def _remove_range(self, event: TraceEvent) -> None:
        end = event.address + event.size_bytes
        parts = self._cover(event.address, end)
        exact = len(parts) == 1 and parts[0].address == event.address and parts[0].end == end
        if not (exact or all(part.expandable for part in parts)):
            found = parts[0].end - parts[0].address
            raise _ContradictionError(f"the segment there afterwards has {found} B")
        index = bisect_left(self._live_starts, event.address)
        if index < len(self._live_starts) and self._live_starts[index] < end:
            raise _ContradictionError(f"the block at {self._live_starts[index]:#x} lives there")
        for part in parts:
            del self._ranges[part.address]
            del self._range_starts[bisect_left(self._range_starts, part.address)]
        first, last = parts[0], parts[-1]
        if first.address < event.address:
            self._keep(replace(first, end=event.address))
        if end < last.end:
            self._keep(replace(last, address=end))
        small = next((part.small for part in parts if part.small is not None), None)
        if first.expandable and small is not None:
            self._keep_base(event.address, first.stream, first.pool_id, small)

    def _keep_base(self, address: int, stream: int, pool_id: tuple[int, int], small: bool) -> None:
        """Remember that an expandable segment reaches down to pages that are not mapped now.

        Once no page is left the segment is gone, because the allocator gives up its addresses.
        """
        key = (stream, pool_id, small)
        if any(
            part.expandable
            and (part.stream, part.pool_id) == (stream, pool_id)
            and part.small in (small, None)
            for part in self._ranges.values()
        ):
            self._bases[key] = min(address, self._bases.get(key, address))
        else:
            self._bases.pop(key, None)

    def _keep(self, part: _Range) -> None:
        self._ranges[part.address] = part
        insort(self._range_starts, part.address)

    def _runs(self, settings: AllocatorSettings) -> Iterator[_Range]:
        """Yield the ranges with their kind settled, neighbours of expandable segments joined."""
        run: _Range | None = None
        for start in self._range_starts:
            part = self._ranges[start]
            before = run if run and _adjoin(run, part) else None
            if part.small is None:
                part = replace(part, small=before.small if before else _looks_small(part, settings))
            if before and before.small == part.small:
                run = replace(before, end=part.end)
                continue
            if run:
                yield run
            run = part
        if run:
            yield run

    def _segment(self, run: _Range, settings: AllocatorSettings) -> SegmentInfo:
        first = bisect_left(self._live_starts, run.address)
        last = bisect_left(self._live_starts, run.end)
        starts = [*self._live_starts[first:last], run.end]
        blocks = [_free(run.address, starts[0])] if starts[0] > run.address else []
        splits_all = run.small or settings.expandable_segments
        for address, following in pairwise(starts):
            live = self._live[address]
            room = following - address
            size = live.size_bytes
            if size is None:
                size = round_size(live.requested_bytes, settings.divisions(live.requested_bytes))
                oversize = size >= (settings.max_split_size_bytes or room + 1)
                within = min(room, live.reach - address)
                if not splits_all and (oversize or within - size <= SMALL_BYTES):
                    size = within  # too little was left over to split it off
            size = min(size, room)
            blocks.append(
                BlockInfo(
                    address=address,
                    size_bytes=size,
                    requested_bytes=live.requested_bytes,
                    state=live.state,
                )
            )
            if size < room:
                blocks.append(_free(address + size, following))
        return SegmentInfo(
            address=run.address,
            size_bytes=run.end - run.address,
            stream=run.stream,
            small=bool(run.small),
            pool_id=run.pool_id,
            expandable=run.expandable,
            blocks=tuple(blocks),
        )


def _adjoin(before: _Range, part: _Range) -> bool:
    """Whether two ranges may be one expandable segment."""
    return (
        before.expandable
        and part.expandable
        and before.end == part.address
        and before.stream == part.stream
        and before.pool_id == part.pool_id
    )


def _looks_small(part: _Range, settings: AllocatorSettings) -> bool:
    """Guess the kind of a segment from its size alone, no block in it being known."""
    size = part.end - part.address
    if part.expandable:
        return size % settings.large_segment_bytes != 0
    return size == SMALL_SEGMENT_BYTES


def _free(start: int, end: int) -> BlockInfo:
    return BlockInfo(address=start, size_bytes=end - start, requested_bytes=0, state="free")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The part of one device's trace that agrees with the final state.

    Attributes:
        start: the state before the first of `events`.
        events: the events, each with the private pool of its segment.
        skipped: how many events came before them, and cannot be placed.
        contradiction: why they cannot, in words; None where there are none.
    """

    start: tuple[SegmentInfo, ...]
    events: tuple[TraceEvent, ...]
    skipped: int
    contradiction: str | None


def rewind(snapshot: Snapshot, device: int) -> Recording:
    """Undo a device's trace from its final segments, as far back as the two agree."""
    memory = MemoryMap(snapshot.segments.get(device, ()))
    trace = snapshot.traces.get(device, ())
    events: list[TraceEvent] = []
    contradiction = None
    for index in range(len(trace) - 1, -1, -1):
        event = trace[index]
        if event.pool_id == DEFAULT_POOL:  # older recordings leave it out; segments have it
            owner = memory.pool_id(event.address)
            if owner != DEFAULT_POOL:
                event = replace(event, pool_id=owner)
        try:
            memory.undo(event)
        except _ContradictionError as error:
            contradiction = (
                f"event {index} ({event.action} of {event.size_bytes} B at {event.address:#x})"
                f" contradicts the state after it: {error}"
            )
            break
        events.append(event)
    return Recording(
        start=memory.segments(snapshot.settings),
        events=tuple(reversed(events)),
        skipped=len(trace) - len(events),
        contradiction=contradiction,
    )
