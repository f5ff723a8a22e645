"""Runs a trace through the caching allocator: does it fit, and how much does it reserve?

Invariant: the same trace and settings always give the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autobatch.memory.allocator import CachingAllocator

__all__ = ["Replay", "simulate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What the allocator did with a trace, up to its end or to the first request that failed.

    Attributes:
        peak_allocated_bytes: most bytes of blocks in use, as the allocator rounds them.
        peak_reserved_bytes: most bytes in segments.
        peak_event: first event after which most bytes were allocated.
        alloc_retries: how often everything cached had to be released.
        oom_event: the event that could not be satisfied; None if all could.
        allocated_bytes, reserved_bytes: after each event; empty unless a timeline was asked for.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_event: int
    alloc_retries: int
    oom_event: int | None
    allocated_bytes: tuple[int, ...] = ()
    reserved_bytes: tuple[int, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every request was met without releasing the cache, which would stall the GPU."""
        return self.oom_event is None and self.alloc_retries == 0


def simulate(
    sizes: Sequence[int],
    events: Sequence[int],
    *,
    allocator: CachingAllocator | None = None,
    streams: Sequence[int] | None = None,
    timeline: bool = False,
) -> Replay:
    """Run a trace through an allocator; a block of 0 bytes takes no memory.

    Args:
        sizes: requested bytes of each block.
        events: `b` allocates block `b`, `~b` frees it, as in `Trace.events`.
        allocator: where to run it; a new one with PyTorch's defaults and no limit if None.
        streams: stream of each block; all on one if None.
        timeline: also return allocated and reserved bytes after each event.

    >>> simulate([600, 3 << 20], [0, 1, ~0]).peak_reserved_bytes >> 20
    22
    """
    allocator = allocator or CachingAllocator()
    instants: list[tuple[int, int]] | None = [] if timeline else None
    peak, peak_event, oom_event = allocator.run(sizes, events, streams, instants)
    allocated, reserved = zip(*instants, strict=True) if instants else ((), ())
    return Replay(
        peak_allocated_bytes=peak,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        peak_event=peak_event,
        alloc_retries=allocator.alloc_retries,
        oom_event=oom_event,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
    )
