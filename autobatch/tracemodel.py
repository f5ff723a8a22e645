"""The trace at any micro-batch, from two or three traces that were executed.

Invariant: the fitted traces are reproduced exactly, block by block, and every size is computed
in integers. Two traces give sizes affine in the micro-batch, three give quadratic ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter

from autobatch.trace import Block, Trace, running_bytes

__all__ = ["Misaligned", "TraceModel"]

_identity = attrgetter("category", "phase", "op")


class Misaligned(ValueError):
    """Two traces are not the same sequence of allocations and frees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceModel:
    """Sizes of every block as a polynomial in the micro-batch; make one with `fit`.

    Newton's divided differences over a common denominator: with nodes n0 < n1 < n2,
    size(n) = base + (slope * (n - n0) + bend * (n - n0) * (n - n1)) / denominator.

    Attributes:
        template: the trace at the smallest fitted micro-batch.
        nodes: the fitted micro-batches, ascending.
        slopes, bends: coefficients of each block, times the denominator.
        denominator: positive; 1 for traces at neighbouring micro-batches.
    """

    template: Trace
    nodes: tuple[int, ...]
    slopes: tuple[int, ...]
    bends: tuple[int, ...]
    denominator: int

    @classmethod
    def fit(cls, traces: Sequence[Trace]) -> TraceModel:
        """Align two or three traces at different micro-batches and fit every block's size.

        Raises:
            Misaligned: the traces differ in anything but the sizes of their blocks.
            ValueError: there are not two or three different micro-batches.
        """
        ordered = sorted(traces, key=lambda trace: trace.micro_batch)
        nodes = tuple(trace.micro_batch for trace in ordered)
        if len(nodes) not in (2, 3) or len(set(nodes)) != len(nodes):
            raise ValueError(f"a trace model needs 2 or 3 different micro-batches, got {nodes}")
        for first, second in pairwise(ordered):
            if reason := _misalignment(first, second):
                raise Misaligned(reason)
        sizes = [trace.sizes for trace in ordered]
        if len(nodes) == 2:
            return cls(
                template=ordered[0],
                nodes=nodes,
                slopes=tuple(s1 - s0 for s0, s1 in zip(*sizes, strict=True)),
                bends=(0,) * len(sizes[0]),
                denominator=nodes[1] - nodes[0],
            )
        n0, n1, n2 = nodes
        bends = [
            (s2 - s1) * (n1 - n0) - (s1 - s0) * (n2 - n1) for s0, s1, s2 in zip(*sizes, strict=True)
        ]
        rise = (n2 - n1) * (n2 - n0)
        return cls(
            template=ordered[0],
            nodes=nodes,
            slopes=tuple((s1 - s0) * rise for s0, s1, _ in zip(*sizes, strict=True)),
            bends=tuple(bends),
            denominator=(n1 - n0) * rise,
        )

    @property
    def degree(self) -> int:
        """2 if any block's size is quadratic in the micro-batch, else 1."""
        return 2 if any(self.bends) else 1

    def sizes(self, micro_batch: int) -> list[int]:
        """Return the requested bytes of each block, to the nearest byte and never negative."""
        step = micro_batch - self.nodes[0]
        bend_step = step * (micro_batch - self.nodes[1])
        denominator = self.denominator
        half = denominator // 2
        return [
            max(0, block.size_bytes + (slope * step + bend * bend_step + half) // denominator)
            for block, slope, bend in zip(
                self.template.blocks, self.slopes, self.bends, strict=True
            )
        ]

    def trace(self, micro_batch: int) -> Trace:
        """Return the whole trace at a micro-batch, executed or not."""
        blocks = tuple(
            block
            if block.size_bytes == size
            else Block(size, block.category, block.phase, block.op)
            for block, size in zip(self.template.blocks, self.sizes(micro_batch), strict=True)
        )
        return Trace(
            micro_batch=micro_batch,
            accumulation_steps=self.template.accumulation_steps,
            blocks=blocks,
            events=self.template.events,
            marks=self.template.marks,
        )

    def difference(self, trace: Trace) -> str | None:
        """Return how an executed trace departs from the model's, or None where they are equal."""
        if reason := _misalignment(self.template, trace):
            return reason
        expected = self.sizes(trace.micro_batch)
        for index, (block, size) in enumerate(zip(trace.blocks, expected, strict=True)):
            if block.size_bytes != size:
                return (
                    f"block {index} ({block.op}, {block.phase}) at micro-batch "
                    f"{trace.micro_batch}: expected {size} bytes, found {block.size_bytes}"
                )
        return None

    def foretells_start_of(self, trace: Trace) -> bool:
        """Return whether a trace begins as the model says, up to the end of its first micro-batch.

        That part does not depend on the accumulation steps, and every op's law of size is in it.
        """
        end = next(
            (mark.event for mark in self.template.marks if mark.phase in ("inputs", "step")
             and (mark.window, mark.micro_batch) != (0, 0)),
            len(self.template.events),
        )  # fmt: skip
        if self.template.events[:end] != trace.events[:end]:
            return False
        sizes = self.sizes(trace.micro_batch)
        started = sum(event >= 0 for event in self.template.events[:end])
        return all(
            (block.op, block.phase, size) == (other.op, other.phase, other.size_bytes)
            for block, size, other in zip(
                self.template.blocks[:started], sizes, trace.blocks, strict=False
            )
        )

    def peak_bytes(self, micro_batch: int) -> int:
        """Return the most requested bytes alive at once, before the allocator rounds them."""
        return max(running_bytes(self.sizes(micro_batch), self.template.events), default=0)

    def bytes_per_sample(self, first: int, second: int) -> float:
        """Return the slope of the peak between two micro-batches, in bytes per sample."""
        return (self.peak_bytes(second) - self.peak_bytes(first)) / (second - first)


def _misalignment(first: Trace, second: Trace) -> str | None:
    """Return the first difference between two traces other than sizes, as a sentence."""
    where = f"traces at micro-batch {first.micro_batch} and {second.micro_batch} differ"
    if first.accumulation_steps != second.accumulation_steps:
        return (
            f"{where} in accumulation steps: {first.accumulation_steps} and "
            f"{second.accumulation_steps}"
        )
    same = first.events == second.events and first.marks == second.marks
    if same and all(map(_same_identity, first.blocks, second.blocks)):
        return None
    for index, (event, other) in enumerate(zip(first.events, second.events, strict=False)):
        ours, theirs = _describe(first, event), _describe(second, other)
        if event != other or ours != theirs:
            return f"{where} at event {index}: {ours} against {theirs}"
    if len(first.events) != len(second.events):
        return f"{where} in length: {len(first.events)} and {len(second.events)} events"
    return f"{where} in where their phases begin"


def _same_identity(first: Block, second: Block) -> bool:
    return bool(_identity(first) == _identity(second))


def _describe(trace: Trace, event: int) -> str:
    index = event if event >= 0 else ~event
    block = trace.blocks[index]
    action = "alloc" if event >= 0 else "free"
    return f"{action} of block {index} ({block.category}, {block.op}, {block.phase})"
