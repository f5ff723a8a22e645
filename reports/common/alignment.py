"""Two traces of the same windows, allocation by allocation: what both have, and what only one has.

Invariant: inside each phase of each micro-batch, as many allocations as possible are paired, in
order, and a pair has one rounded size. Allocations of no bytes are left out, as no allocator sees
them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from autobatch.memory.alignment import Moment, by_moment, longest_common, scratch_blocks
from autobatch.memory.blocks import round_size
from autobatch.memory.trace import Trace

_TOP = 15


@dataclass(frozen=True, slots=True)
class Alignment:
    """Indices of blocks: pairs of (real, virtual), and those without a partner."""

    pairs: tuple[tuple[int, int], ...]
    only_real: tuple[int, ...]
    only_virtual: tuple[int, ...]


def align(real: Trace, virtual: Trace) -> Alignment:
    """Pair the allocations of two traces."""
    ours, theirs = _taken(real), _taken(virtual)
    pairs: list[tuple[int, int]] = []
    for moment, blocks in ours.items():
        others = theirs.get(moment, [])
        sizes, other_sizes = _rounded(real, blocks), _rounded(virtual, others)
        found = longest_common(len(sizes), len(other_sizes), partial(_equal, sizes, other_sizes))
        pairs += [(blocks[i], others[j]) for i, j in found]
    paired_ours, paired_theirs = ({pair[side] for pair in pairs} for side in (0, 1))
    return Alignment(
        pairs=tuple(pairs),
        only_real=tuple(b for blocks in ours.values() for b in blocks if b not in paired_ours),
        only_virtual=tuple(
            b for blocks in theirs.values() for b in blocks if b not in paired_theirs
        ),
    )


def summary(real: Trace, virtual: Trace) -> dict[str, Any]:
    """Return the alignment as a record: counts, bytes at the peaks, and the ops concerned."""
    aligned = align(real, virtual)
    at_peak, at_virtual_peak = (_live_at_peak(trace) for trace in (real, virtual))
    scratch = scratch_blocks(real)
    ends, virtual_ends = _ends(real), _ends(virtual)
    moved = [pair for pair in aligned.pairs if ends[pair[0]] != virtual_ends[pair[1]]]
    return {
        "matched": len(aligned.pairs),
        "only_real": len(aligned.only_real),
        "only_virtual": len(aligned.only_virtual),
        "only_real_scratch": sum(block in scratch for block in aligned.only_real),
        "only_real_bytes_at_peak": _bytes(real, at_peak & set(aligned.only_real)),
        "only_virtual_bytes_at_peak": _bytes(virtual, at_virtual_peak & set(aligned.only_virtual)),
        "freed_elsewhere": len(moved),
        "freed_elsewhere_bytes": _bytes(real, (pair[0] for pair in moved)),
        "peak_bytes": _bytes(real, at_peak),
        "virtual_peak_bytes": _bytes(virtual, at_virtual_peak),
        "only_real_ops": _by_op(real, aligned.only_real, at_peak),
        "only_virtual_ops": _by_op(virtual, aligned.only_virtual, at_virtual_peak),
        "freed_elsewhere_ops": _by_op(real, [pair[0] for pair in moved], at_peak),
    }


def _equal(first: Sequence[int], second: Sequence[int], i: int, j: int) -> bool:
    return first[i] == second[j]


def _taken(trace: Trace) -> dict[Moment, list[int]]:
    """Return the blocks by the moment of their allocation, without those of no bytes."""
    return {
        moment: [block for block in blocks if trace.blocks[block].size_bytes]
        for moment, blocks in by_moment(trace).items()
    }


class _Moments:
    """Tells where in the windows an event is."""

    def __init__(self, trace: Trace):
        self._begins = [mark.event for mark in trace.marks]
        self._marks = trace.marks

    def at(self, event: int) -> Moment:
        place = bisect_right(self._begins, event)
        if not place:
            return (0, 0, "setup")
        mark = self._marks[place - 1]
        return (mark.window, mark.micro_batch, mark.phase)


def _ends(trace: Trace) -> dict[int, Moment | None]:
    """Return the moment in which each block is freed; None where it never is."""
    moments = _Moments(trace)
    ends: dict[int, Moment | None] = dict.fromkeys(range(len(trace.blocks)))
    for place, event in enumerate(trace.events):
        if event < 0:
            ends[~event] = moments.at(place)
    return ends


def _live_at_peak(trace: Trace) -> set[int]:
    return set(trace.live_at(trace.peak_event())) if trace.events else set()


def _rounded(trace: Trace, blocks: Sequence[int]) -> list[int]:
    return [round_size(trace.blocks[block].size_bytes) for block in blocks]


def _bytes(trace: Trace, blocks: Iterable[int]) -> int:
    return sum(trace.blocks[block].size_bytes for block in blocks)


def _by_op(trace: Trace, blocks: Iterable[int], at_peak: set[int]) -> list[dict[str, Any]]:
    """Return the ops with most bytes among some blocks."""
    count: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    peak: Counter[tuple[str, str]] = Counter()
    for index in blocks:
        block = trace.blocks[index]
        key = (block.op, block.phase)
        count[key] += 1
        size[key] += block.size_bytes
        peak[key] += block.size_bytes if index in at_peak else 0
    return [
        {
            "op": op or "none (outside of any op)",
            "phase": phase,
            "count": count[op, phase],
            "bytes": total,
            "bytes_at_peak": peak[op, phase],
        }
        for (op, phase), total in size.most_common(_TOP)
    ]
