"""Which allocations two traces of the same windows have in common, and where they differ.

Invariant: allocations are paired inside one phase of one micro-batch, in order, as many as can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from operator import attrgetter

from autobatch.memory.trace import Allocation, Phase, Trace

__all__ = [
    "ABSENT",
    "Misaligned",
    "Moment",
    "by_moment",
    "counterparts",
    "longest_common",
    "misalignment",
    "scratch_blocks",
    "sizes_in_common",
    "with_frees_in_order",
    "with_labels_of",
]

ABSENT = -1
"""Stands for the size of a block that a trace does not have."""

Moment = tuple[int, int, Phase]
"""A window, a micro-batch of it, and a phase."""

_PADDING_BYTES = 512
"""Kernels pad what they take; a size may exceed what the larger micro-batch explains by this."""

_DIFFERENCES = 1000
"""Traces of one workload differ in fewer allocations of a moment."""

_ALONE = 0.1
"""Traces of which more than this share of the bytes has no counterpart are not of one sequence."""

_SCRATCH_EVENTS = 8
"""Scratch memory is freed within this many events, because a kernel takes only a few buffers."""

_kind = attrgetter("category", "phase", "op", "stream")


class Misaligned(ValueError):
    """Traces are not the same sequence of allocations and frees, or their sizes follow no model."""


def same_kind(first: Allocation, second: Allocation) -> bool:
    """Whether two allocations are for the same purpose, whatever their sizes."""
    return bool(_kind(first) == _kind(second))


def with_frees_in_order(trace: Trace) -> Trace:
    """Return a trace in which of blocks that are freed one after the other the last come first.

    Autocast's cache of weights is a hash table by address, which frees its casts in an order that
    differs from run to run. An allocator ends in the same state whatever the order of such frees.
    """
    events = list(trace.events)
    begins = {mark.event for mark in trace.marks}
    start = len(events)  # of frees that follow one another
    for place, event in enumerate(trace.events):
        if event >= 0 or place in begins:
            if place - start > 1:
                events[start:place] = sorted(events[start:place])
            start = place if event < 0 else len(events)
        elif start > place:
            start = place
    events[start:] = sorted(events[start:])
    ordered = tuple(events)
    return trace if ordered == trace.events else replace(trace, events=ordered)


def with_labels_of(trace: Trace, labelled: Trace) -> Trace:
    """Return a trace with the ops and labels of another one of the same windows.

    A block without a counterpart of its size keeps its own.
    """
    nameless = replace(labelled, blocks=tuple(replace(block, op="") for block in labelled.blocks))
    blocks = list(trace.blocks)
    for index, other in counterparts(nameless, trace).items():
        block, named = blocks[index], labelled.blocks[other]
        if block.size_bytes == named.size_bytes:
            blocks[index] = replace(block, op=named.op, label=named.label)
    return replace(trace, blocks=tuple(blocks))


def by_moment(trace: Trace) -> dict[Moment, list[int]]:
    """Return the blocks by the moment of their allocation, each list in order."""
    begins = [0, *(mark.event for mark in trace.marks), len(trace.events)]
    moments: list[Moment] = [(0, 0, "setup")]
    moments += [(mark.window, mark.micro_batch, mark.phase) for mark in trace.marks]
    groups: dict[Moment, list[int]] = {}
    for moment, (begin, end) in zip(moments, pairwise(begins), strict=True):
        found = [event for event in trace.events[begin:end] if event >= 0]
        groups.setdefault(moment, []).extend(found)
    return groups


def counterparts(small: Trace, large: Trace) -> dict[int, int]:
    """Return, for blocks of the trace at a larger micro-batch, their counterparts at a smaller one.

    Kernels choose their ways, and with them their buffers, by the shape, so that some blocks of
    either trace have no counterpart. Where a moment has allocations of the same kinds in both, they
    are paired one by one; elsewhere, as many as possible whose sizes are constant, proportional to
    the micro-batch or to its square, and between these as many as could be a sum of such terms.
    """
    smaller = by_moment(small)
    pairs: dict[int, int] = {}
    for moment, blocks in by_moment(large).items():
        others = smaller.get(moment, [])
        found = _pairs_of_moment(
            [small.blocks[block] for block in others],
            [large.blocks[block] for block in blocks],
            growth=large.micro_batch / small.micro_batch,
        )
        pairs.update((blocks[j], others[i]) for i, j in found)
    return pairs


def _pairs_of_moment(
    small: Sequence[Allocation], large: Sequence[Allocation], growth: float
) -> Iterator[tuple[int, int]]:
    if len(small) == len(large) and all(map(same_kind, small, large)):
        yield from ((i, i) for i in range(len(small)))
        return
    i = j = 0
    for end, other_end in (
        *_pairs_that(partial(_grows_evenly, growth=growth), small, large),
        (len(small), len(large)),
    ):
        may_grow = partial(_may_grow, growth=growth)
        between = _pairs_that(may_grow, small[i:end], large[j:other_end])
        yield from ((i + ours, j + theirs) for ours, theirs in between)
        if end < len(small):
            yield end, other_end
        i, j = end + 1, other_end + 1


def _pairs_that(
    rule: Callable[[int, int], bool], small: Sequence[Allocation], large: Sequence[Allocation]
) -> list[tuple[int, int]]:
    def paired(i: int, j: int) -> bool:
        first, second = small[i], large[j]
        return same_kind(first, second) and rule(first.size_bytes, second.size_bytes)

    return longest_common(len(small), len(large), paired)


def _grows_evenly(size: int, larger: int, growth: float) -> bool:
    """Whether a size stays, grows as the micro-batch does, or as its square."""
    return any(abs(larger - size * growth**power) <= _PADDING_BYTES for power in (0, 1, 2))


def _may_grow(size: int, larger: int, growth: float) -> bool:
    """Whether a sum of such terms could become this size."""
    return size <= larger <= size * growth**2 + _PADDING_BYTES


def longest_common(
    length: int, other_length: int, same: Callable[[int, int], bool], *, most: int = _DIFFERENCES
) -> list[tuple[int, int]]:
    """Return index pairs of a longest common subsequence of two sequences.

    Where more than `most` (at least 1) elements of both together are left out, only what they begin
    with in common is paired: memory and time grow with the square of the differences.

    The greedy algorithm of E. W. Myers, "An O(ND) difference algorithm and its variations"
    (Algorithmica 1, 1986): it takes time in proportion to the length times the differences. A
    diagonal k is where an index of the first exceeds that of the second by k.

    >>> first, second = "abcd", "axd"
    >>> longest_common(4, 3, lambda i, j: first[i] == second[j])
    [(0, 0), (3, 2)]
    """
    reached = {1: 0}  # by diagonal, the furthest index of the first sequence
    before: list[dict[int, int]] = []
    for differences in range(min(length + other_length, most) + 1):
        before.append(dict(reached))
        for diagonal in range(-differences, differences + 1, 2):
            i = _step(reached, diagonal)
            while i < length and i - diagonal < other_length and same(i, i - diagonal):
                i += 1
            reached[diagonal] = i
            if i >= length and i - diagonal >= other_length:
                return _way_back(before, length, other_length)
    return [(i, i) for i in range(before[1][0])]


def _step(reached: Mapping[int, int], diagonal: int) -> int:
    """Return where a diagonal is entered: from the one above or below, whichever is further."""
    return max(reached.get(diagonal + 1, -1), reached.get(diagonal - 1, -1) + 1)


def _way_back(before: Sequence[Mapping[int, int]], i: int, j: int) -> list[tuple[int, int]]:
    """Return the pairs on the way that led to an end."""
    pairs: list[tuple[int, int]] = []
    for reached in reversed(before):
        diagonal = i - j
        entered = _step(reached, diagonal)
        while i > entered:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        if reached.get(diagonal + 1, -1) >= reached.get(diagonal - 1, -1) + 1:
            j -= 1
        else:
            i -= 1
    return pairs[::-1]


def scratch_blocks(trace: Trace) -> frozenset[int]:
    """Return the blocks that are freed within a few events, as a kernel's scratch memory is.

    Workspaces count as well, because the kernel that needs one first allocates it for all.
    """
    found = {i for i, block in enumerate(trace.blocks) if block.category == "workspace"}
    events = trace.events
    start = 0
    while start < len(events):
        end = _end_of_scratch(events, start)
        found.update(event for event in events[start:end] if event >= 0)
        start = max(end, start + 1)
    return frozenset(found)


def _end_of_scratch(events: Sequence[int], start: int) -> int:
    """Return the event by which all blocks allocated from `start` on are freed, or `start`."""
    alive: set[int] = set()
    for place in range(start, min(start + _SCRATCH_EVENTS, len(events))):
        event = events[place]
        if event >= 0:
            alive.add(event)
        elif ~event in alive:
            alive.remove(~event)
        else:
            return start
        if not alive:
            return place + 1
    return start


def sizes_in_common(
    small: Trace, large: Trace, scratch: frozenset[int], difference: str
) -> list[int]:
    """Return, for each block of the larger trace, the size of its counterpart in the smaller one.

    Raises:
        Misaligned: too much of either has no counterpart.
    """
    if small.accumulation_steps != large.accumulation_steps:
        raise Misaligned(difference)
    pairs = counterparts(small, large)
    sizes = [ABSENT] * len(large.blocks)
    for block, other in pairs.items():
        sizes[block] = small.blocks[other].size_bytes
    for trace, paired, left_out in (
        (large, set(pairs), scratch),
        (small, set(pairs.values()), scratch_blocks(small)),
    ):
        kept = [i for i in range(len(trace.blocks)) if i not in left_out]
        alone = sum(trace.blocks[i].size_bytes for i in kept if i not in paired)
        if alone > _ALONE * sum(trace.blocks[i].size_bytes for i in kept):
            raise Misaligned(f"{difference}, and too much is in one of them only")
    return sizes


def misalignment(first: Trace, second: Trace) -> str | None:
    """Return the first difference between two traces other than sizes, as a sentence."""
    where = f"traces at micro-batch {first.micro_batch} and {second.micro_batch} differ"
    if first.accumulation_steps != second.accumulation_steps:
        return (
            f"{where} in accumulation steps: {first.accumulation_steps} and "
            f"{second.accumulation_steps}"
        )
    first, second = with_frees_in_order(first), with_frees_in_order(second)
    same = first.events == second.events and first.marks == second.marks
    if same and all(map(same_kind, first.blocks, second.blocks)):
        return None
    for index, (event, other) in enumerate(zip(first.events, second.events, strict=False)):
        ours, theirs = _describe(first, event), _describe(second, other)
        if event != other or ours != theirs:
            return f"{where} at event {index}: {ours} against {theirs}"
    if len(first.events) != len(second.events):
        return f"{where} in length: {len(first.events)} and {len(second.events)} events"
    return f"{where} in where their phases begin"


def _describe(trace: Trace, event: int) -> str:
    index = event if event >= 0 else ~event
    block = trace.blocks[index]
    action = "alloc" if event >= 0 else "free"
    return f"{action} of block {index} ({block.category}, {block.op}, {block.phase})"
