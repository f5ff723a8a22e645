"""How far the simulated allocator agrees with a recording."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.blocks import SegmentInfo
from autobatch.memory.recorded_run import RecordedRun
from autobatch.memory.recording import Recording

__all__ = ["Score", "replay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How far the simulation agreed with one recording.

    Attributes:
        events: events that were replayed.
        blocks, blocks_matched: allocations, and those served by the recorded block.
        ties: of those, how many the recording decides between free blocks of one size.
        segments, segments_matched: segments (or mapped ranges) that were made, and those that the
            simulation made for the same allocation in the same size.
        segments_unused: those, not counted above, that no allocation followed at once.
        releases, releases_matched: segments (or ranges) given back, and those wholly free in the
            simulation, too.
        ooms: recorded requests that failed.
        reserved_bytes, allocated_bytes: at the end, as (recorded, simulated).
        first_difference: the first event that differed, in words.
    """

    events: int
    blocks: int
    blocks_matched: int
    ties: int
    segments: int
    segments_matched: int
    segments_unused: int
    releases: int
    releases_matched: int
    ooms: int
    reserved_bytes: tuple[int, int]
    allocated_bytes: tuple[int, int]
    first_difference: str | None

    @property
    def agrees(self) -> bool:
        """Whether everything matched, and the final bytes are equal."""
        return (
            self.blocks == self.blocks_matched
            and self.segments == self.segments_matched
            and self.releases == self.releases_matched
            and self.reserved_bytes[0] == self.reserved_bytes[1]
            and self.allocated_bytes[0] == self.allocated_bytes[1]
        )


def replay(
    recording: Recording, final: Sequence[SegmentInfo], settings: AllocatorSettings
) -> Score:
    """Replay a rewound recording and compare every decision and the final state."""
    run = RecordedRun(recording, settings)
    for index, event in enumerate(recording.events):
        run.step(index + recording.skipped, event)
    actions = Counter(event.action for event in recording.events)
    recorded_allocated = sum(
        block.size_bytes for part in final for block in part.blocks if block.state == "allocated"
    )
    return Score(
        events=len(recording.events),
        blocks=run.blocks,
        blocks_matched=run.blocks_matched,
        ties=run.ties,
        segments=actions["segment_alloc"] + actions["segment_map"] - run.segments_unused,
        segments_matched=run.segments_matched,
        segments_unused=run.segments_unused,
        releases=actions["segment_free"] + actions["segment_unmap"],
        releases_matched=run.releases_matched,
        ooms=actions["oom"],
        reserved_bytes=(sum(part.size_bytes for part in final), run.allocator.reserved_bytes),
        allocated_bytes=(recorded_allocated, run.allocator.allocated_bytes),
        first_difference=run.first_difference,
    )
