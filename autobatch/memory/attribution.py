"""Which layer, operator and tensor holds the memory of a trace.

Invariant: as in `autobatch.records.holders`: what is listed at the peak sums, category by category,
to the footprint's figures without rounding.
"""

from __future__ import annotations

import functools

from autobatch.memory.trace import Allocation, Category, Trace
from autobatch.records.holders import Holder, Lives, PeakBlocks

__all__ = ["category_name", "lives_of", "most_bytes_of", "peak_blocks_of"]

_LARGEST = 2_000
"""Blocks that `Lives` keeps; a window of GPT-2 has some ten thousand, most of them tiny."""

_NAMES: dict[Category, str] = {"optimizer_state": "optimizer state"}


def category_name(category: Category) -> str:
    """Return a category as `Footprint.categories` names it."""
    return _NAMES.get(category, category)


def peak_blocks_of(trace: Trace, event: int, *, held_bytes: int = 0) -> tuple[PeakBlocks, ...]:
    """Return what is alive just after an event, most bytes first.

    Args:
        trace: of training windows, executed or predicted.
        event: at which the footprint was taken.
        held_bytes: allocated before the trace began, by the user's own tensors.
    """
    totals: dict[Holder, tuple[int, int]] = {}
    if held_bytes:
        totals[_HELD] = 1, held_bytes
    for index in trace.live_at(event) if trace.events else ():
        block = trace.blocks[index]
        if block.size_bytes:
            holder = _holder(block)
            count, size_bytes = totals.get(holder, (0, 0))
            totals[holder] = count + 1, size_bytes + block.size_bytes
    found = [
        PeakBlocks(holder=holder, count=count, size_bytes=size_bytes)
        for holder, (count, size_bytes) in totals.items()
    ]
    return tuple(sorted(found, key=lambda blocks: -blocks.size_bytes))


def lives_of(trace: Trace) -> Lives:
    """Return the largest blocks of a trace, with their lives."""
    sizes = sorted((size for size in trace.sizes if size), reverse=True)
    # all of a size or none, so that what is left out is smaller than what is kept
    least = sizes[_LARGEST - 1] if len(sizes) > _LARGEST else 0
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    for event, index in enumerate(trace.events):
        if index >= 0:
            if trace.blocks[index].size_bytes >= max(least, 1):
                starts[index] = event
        elif ~index in starts:
            ends[~index] = event
    numbers: dict[Holder, int] = {}
    of = tuple(numbers.setdefault(_holder(trace.blocks[i]), len(numbers)) for i in starts)
    return Lives(
        holders=tuple(numbers),
        holder=of,
        start=tuple(starts.values()),
        end=tuple(ends.get(index, len(trace.events)) for index in starts),
        size_bytes=tuple(trace.blocks[index].size_bytes for index in starts),
        least_bytes=least,
        events=len(trace.events),
    )


def most_bytes_of(trace: Trace, *, held_bytes: int = 0) -> dict[str, int]:
    """Return by category the most bytes that are alive at once; none for what there never is."""
    alive: dict[Category, int] = {"other": held_bytes}
    most = dict(alive)
    for index in trace.events:
        block = trace.blocks[index if index >= 0 else ~index]
        category = block.category
        now = alive.get(category, 0) + (block.size_bytes if index >= 0 else -block.size_bytes)
        alive[category] = now
        if now > most.get(category, 0):
            most[category] = now
    return {category_name(category): size for category, size in most.items() if size}


def _holder(block: Allocation) -> Holder:
    label = block.label
    return Holder(
        module=label.module,
        op=_plain(block.op),
        category=category_name(block.category),
        phase=block.phase,
        shape=label.shape,
        dtype=label.dtype,
        where=label.where,
    )


@functools.cache
def _plain(op: str) -> str:
    """Return the name of an operator without PyTorch's own namespace and the overload.

    >>> _plain("aten::add.Tensor")
    'add'
    """
    return op.removeprefix("aten::").partition(".")[0]


_HELD = Holder(module="", op="", category="other", phase="setup", shape=(), dtype="", where="")
