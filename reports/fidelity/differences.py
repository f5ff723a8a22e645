"""Every kind of difference between a trace of the bench and a predicted one.

Allocations of less than the allocator's smallest block are paired by their rounded size; what is
left without a partner is summed up by the op that made it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autobatch.memory.trace import Trace
from reports.common.alignment import align

_MOST_KINDS = 12


@dataclass(frozen=True, slots=True)
class Kind:
    """Allocations of one op that only one trace has.

    Attributes:
        side: "bench" or "predicted".
        op: what made them, as that side names it.
        phase: in which they are made.
        size_bytes: of each, as requested.
        count: how many there are in all windows.
        at_peak: how many of them are alive at their trace's peak.
    """

    side: str
    op: str
    phase: str
    size_bytes: int
    count: int
    at_peak: int

    @property
    def weight(self) -> tuple[int, int]:
        """What makes it matter: bytes at the peak, then bytes in all."""
        return self.at_peak * self.size_bytes, self.count * self.size_bytes


def difference(bench: Trace, predicted: Trace) -> dict[str, Any]:
    """Return how two traces of the same windows differ, as a record."""
    aligned = align(bench, predicted)
    kinds = [
        *_kinds("bench", bench, aligned.only_real),
        *_kinds("predicted", predicted, aligned.only_virtual),
    ]
    kinds.sort(key=lambda kind: kind.weight, reverse=True)
    return {
        "same": len(aligned.pairs),
        "only_bench": len(aligned.only_real),
        "only_predicted": len(aligned.only_virtual),
        "first": _first(bench, predicted, aligned.only_real, aligned.only_virtual),
        "kinds": [
            {name: getattr(kind, name) for name in Kind.__dataclass_fields__}
            for kind in kinds[:_MOST_KINDS]
        ],
    }


def _kinds(side: str, trace: Trace, blocks: Sequence[int]) -> list[Kind]:
    live = set(trace.live_at(trace.peak_event())) if trace.events else set()
    count: Counter[tuple[str, str, int]] = Counter()
    at_peak: Counter[tuple[str, str, int]] = Counter()
    for index in blocks:
        block = trace.blocks[index]
        key = (block.op, block.phase, block.size_bytes)
        count[key] += 1
        at_peak[key] += index in live
    return [Kind(side, *key, number, at_peak[key]) for key, number in count.items()]


def _first(
    bench: Trace, predicted: Trace, only_bench: Sequence[int], only_predicted: Sequence[int]
) -> str | None:
    """Describe the first allocation that has no partner."""
    found = []
    for side, trace, blocks in (
        ("bench", bench, only_bench),
        ("predicted", predicted, only_predicted),
    ):
        if blocks:
            block = trace.blocks[blocks[0]]
            share = blocks[0] / len(trace.blocks)
            text = f"{side}: {block.op or 'no op'}, {block.size_bytes:,} B, {block.phase}"
            found.append((share, text))
    return min(found)[1] if found else None


def sequence(bench: Trace, predicted: Trace, context: int = 2) -> list[str]:
    """Return both traces side by side, in order, around every difference."""
    lines: list[tuple[bool, str]] = []
    first = second = 0
    ends = (len(bench.blocks), len(predicted.blocks))
    for ours, theirs in [*sorted(align(bench, predicted).pairs), ends]:
        lines += [(False, f"bench      {_line(bench, index)}") for index in range(first, ours)]
        lines += [
            (False, f" predicted {_line(predicted, index)}") for index in range(second, theirs)
        ]
        if ours < ends[0]:
            op = predicted.blocks[theirs].op
            lines.append((True, f"both       {_line(bench, ours)} | {op}"))
        first, second = ours + 1, theirs + 1
    shown: list[str] = []
    for place, (_, text) in enumerate(lines):
        near = lines[max(place - context, 0) : place + context + 1]
        if not all(is_same for is_same, _ in near):
            shown.append(text)
    return shown


def _line(trace: Trace, index: int) -> str:
    block = trace.blocks[index]
    return f"{block.phase:8} {block.size_bytes:>14,} {block.op}"
