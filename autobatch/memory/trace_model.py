"""Predicts the trace at any micro-batch from two or three traces that were executed.

Invariant: the largest fitted trace is reproduced exactly, block by block, the others as well where
they differ in sizes alone, and every size is computed in integers. Two traces give sizes affine in
the micro-batch, three give quadratic ones; or, where elements were spread equally over parts and
each part was rounded up, sizes affine in the micro-batch and in that count.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from autobatch.memory.alignment import counterparts, same_kind, with_frees_in_order
from autobatch.memory.rounding import Rounding, roundings
from autobatch.memory.scratch import interleaved, with_scratch
from autobatch.memory.trace import (
    UNLABELLED,
    Allocation,
    Bare,
    Kernel,
    Label,
    Requests,
    Trace,
    running_bytes,
)

__all__ = ["Misaligned", "Refuted", "TraceModel", "nodes_for", "scratch_blocks"]

SCRATCH_EVENTS = 8
"""Scratch memory is freed within this many events, because a kernel takes only a few buffers."""


class Misaligned(ValueError):
    """Traces are not the same sequence of allocations and frees, or their sizes follow no model."""


class Refuted(Misaligned):
    """Traces are one sequence of allocations and frees, but their sizes follow another rule."""


@dataclass(frozen=True, kw_only=True)
class TraceModel:
    """Sizes of every block as a polynomial in the micro-batch; make one with `fit`.

    Newton's divided differences over a common denominator: with nodes n0 < n1 < n2,
    size(n) = (base + slope * (n - n0) + bend * (n - n0) * (n - n1)) / denominator.
    Where there is a rounding, its departure from the line through n0 and n1 is in place of the
    product: it is zero there as well.

    Attributes:
        template: the trace at the largest fitted micro-batch.
        nodes: the fitted micro-batches, ascending.
        bases, slopes, bends: coefficients of each block, times the denominator.
        denominator: positive.
        kernels: those of the template that may take scratch.
        numbers: coefficients of the numbers of each kernel, as those of a block's size.
        labels: of each block of the template, in each fitted trace; empty where a trace lacks it.
        rounding: the count that is rounded up, on which sizes depend; None where there is none.
        is_exact: whether the traces differed in sizes alone. Then a size that is predicted to be
            negative, or no whole number, shows that sizes follow another rule.
    """

    template: Trace
    nodes: tuple[int, ...]
    bases: tuple[int, ...]
    slopes: tuple[int, ...]
    bends: tuple[int, ...]
    denominator: int
    kernels: tuple[Kernel, ...] = ()
    numbers: tuple[tuple[_Term, ...], ...] = ()
    labels: tuple[tuple[Label, ...], ...] = field(default=(), compare=False, repr=False)
    rounding: Rounding | None = None
    is_exact: bool = True

    @classmethod
    def fit(cls, traces: Sequence[Trace], *, kernels_may_vary: bool = False) -> TraceModel:
        """Align two or three traces at different micro-batches and fit every block's size.

        Args:
            traces: of the same workload.
            kernels_may_vary: for traces of a real GPU, whose kernels choose their way, and with
                it their scratch memory, by the shape, and where caches are emptied in the order
                of addresses. Traces then need to have most of their bytes in common. The size of
                scratch memory follows the line through the two largest micro-batches; what only
                the largest one has grows in proportion to the micro-batch, or, if it is kept
                longer than a window, not at all.

        Raises:
            Misaligned: the traces differ in anything but the sizes of their blocks, or, where
                kernels may vary, have too little in common; or their sizes depend on counts that
                are rounded up in several ways, or in one that these micro-batches do not show.
            ValueError: there are not two or three different micro-batches.
        """
        whole = sorted(traces, key=lambda trace: trace.micro_batch)
        ordered = [trace if trace.bare is None else trace.bare.trace for trace in whole]
        nodes = tuple(trace.micro_batch for trace in ordered)
        if len(nodes) not in (2, 3) or len(set(nodes)) != len(nodes):
            raise ValueError(f"a trace model needs 2 or 3 different micro-batches, got {nodes}")
        last = ordered[-1]
        columns: list[Sequence[int]] = []
        labels: list[tuple[Label, ...]] = []
        scratch = scratch_blocks(last) if kernels_may_vary else frozenset()
        for trace in ordered[:-1]:
            reason = _misalignment(trace, last)
            if reason is None:
                columns.append(trace.sizes)
                labels.append(tuple([block.label for block in trace.blocks]))
            elif kernels_may_vary:
                columns.append(_sizes_in_common(trace, last, scratch, reason))
                labels.append((UNLABELLED,) * len(last.blocks))
            else:
                raise Misaligned(reason)
        interpolation = _Interpolation.over(nodes, _rounding(ordered))
        terms: list[_Term] = []
        rows = zip(*columns, last.sizes, strict=True)
        for index, (block, row) in enumerate(zip(last.blocks, rows, strict=True)):
            if index in scratch or _ABSENT in row:
                grows = block.category not in _PERMANENT
                terms.append(interpolation.line(*row[-2:], grows=grows))
            else:
                terms.append(interpolation.polynomial(row))
        bases, slopes, bends = zip(*terms, strict=True) if terms else ((), (), ())
        kernels = [() if trace.bare is None else trace.bare.kernels for trace in whole]
        return cls(
            kernels=kernels[-1],
            numbers=tuple(_numbers(kernels, interpolation, nodes)),
            template=last,
            nodes=nodes,
            bases=bases,
            slopes=slopes,
            bends=bends,
            denominator=interpolation.denominator,
            labels=(*labels, tuple([block.label for block in last.blocks])),
            rounding=interpolation.rounding,
            is_exact=not kernels_may_vary,
        )

    @property
    def degree(self) -> int:
        """2 if any block's size is quadratic in the micro-batch, else 1."""
        return 2 if any(self.bends) and self.rounding is None else 1

    @property
    def quadratic_share(self) -> float:
        """The share of all bytes at the largest fitted size that quadratic terms make up.

        A small share comes from kernels that pad to a multiple; their memory is not quadratic.
        """
        if self.degree == 1:
            return 0.0
        first, second, last = self.nodes
        bent = sum(map(abs, self.bends)) * (last - first) * (last - second) / self.denominator
        return bent / max(sum(self.template.sizes), 1)

    def sizes(self, micro_batch: int) -> list[int]:
        """Return the requested bytes of each block of the template.

        Where the model is not exact, they are those to the nearest byte, and at least 0.

        Raises:
            Refuted: the model is exact, and a size would be no whole number, or negative.
        """
        terms, places = self._terms
        if self.is_exact:
            values = self._sizes_of(micro_batch)(terms)
        else:
            value_of = self._evaluator(micro_batch)
            values = [max(0, value_of(term)) for term in terms]
        return [values[place] for place in places]

    @cached_property
    def _terms(self) -> tuple[list[_Term], list[int]]:
        """The terms of blocks, each once, and the place among them of each block's."""
        return _distinct(zip(self.bases, self.slopes, self.bends, strict=True))

    def _evaluator(self, micro_batch: int) -> Callable[[_Term], int]:
        """Return what evaluates the terms of a polynomial, to the nearest whole number."""
        step = micro_batch - self.nodes[0]
        bend_step = _bend(self.nodes, self.rounding, micro_batch)
        denominator = self.denominator
        half = denominator // 2

        def value_of(term: _Term) -> int:
            base, slope, bend = term
            return (base + slope * step + bend * bend_step + half) // denominator

        return value_of

    def _sizes_of(self, micro_batch: int) -> Callable[[Iterable[_Term]], list[int]]:
        """Return what evaluates terms of sizes and strides.

        It raises Refuted where one that varies is negative or, in an exact model, no whole
        number.
        """
        step = micro_batch - self.nodes[0]
        bend_step = _bend(self.nodes, self.rounding, micro_batch)
        denominator, is_exact = self.denominator, self.is_exact
        half = 0 if is_exact else denominator // 2

        def sizes_of(terms: Iterable[_Term]) -> list[int]:
            sizes = []
            for base, slope, bend in terms:
                times = base + slope * step + bend * bend_step + half
                size, left = divmod(times, denominator)
                varies = slope or bend  # a dimension that is counted from the end is -1 throughout
                if varies and (size < 0 or (left and is_exact)):
                    raise Refuted(
                        f"what ran at micro-batches {', '.join(map(str, self.nodes))} foretells "
                        f"{times / denominator:,g} at micro-batch {micro_batch}, which no size is"
                    )
                sizes.append(size)
            return sizes

        return sizes_of

    def trace(self, micro_batch: int) -> Trace:
        """Return the whole trace at a micro-batch, executed or not.

        Raises:
            Refuted: as `sizes` does, or a number of a kernel is.
        """
        blocks = tuple(
            [
                block
                if block.size_bytes == size
                else Allocation(size, block.category, block.phase, block.op, block.stream, label)
                for block, size, label in zip(
                    self.template.blocks,
                    self.sizes(micro_batch),
                    self._labels(micro_batch),
                    strict=True,
                )
            ]
        )
        trace = Trace(
            micro_batch=micro_batch,
            accumulation_steps=self.template.accumulation_steps,
            blocks=blocks,
            events=self.template.events,
            marks=self.template.marks,
        )
        return with_scratch(Bare(trace, self._kernels(micro_batch))) if self.kernels else trace

    def _labels(self, micro_batch: int) -> list[Label]:
        """Return the label of each block, its shape along the line through the fitted ones."""
        value_of = self._evaluator(micro_batch)
        polynomial = _Interpolation.over(self.nodes, self.rounding).polynomial
        known: dict[tuple[int, ...], Label] = {}  # by ids of labels, which the traces hold
        found = []
        for labels in zip(*self.labels, strict=True):
            key = tuple(map(id, labels))
            label = known.get(key)
            if label is None:
                *_, last = labels
                if any(len(other.shape) != len(last.shape) for other in labels):
                    label = replace(last, shape=(), dtype="")
                else:
                    dims = zip(*(other.shape for other in labels), strict=True)
                    label = replace(last, shape=tuple(value_of(polynomial(row)) for row in dims))
                known[key] = label
            found.append(label)
        return found

    def requests(self, micro_batch: int) -> Requests:
        """Return what the trace at a micro-batch asks the allocator for, event by event.

        It is the same as that of `trace`, but for the numbers of blocks, in a tenth of the time.

        Raises:
            Refuted: as `sizes` does, or a number of a kernel is.
        """
        sizes = self.sizes(micro_batch)
        streams = [block.stream for block in self.template.blocks]
        events: Sequence[int] = self.template.events
        if self.kernels:
            sizes_of = self._sizes_of(micro_batch)
            firsts, shared = self._questions
            steps = {
                first: self.kernels[first].takes(tuple(sizes_of(self.numbers[first])))
                for first in firsts
            }
            taking = zip(self.kernels, [steps[first] for first in shared], strict=True)
            mixed = interleaved(events, taking, len(sizes))
            events = mixed.events
            sizes += [size_bytes for _, size_bytes, _ in mixed.pieces]
            streams += [kernel.stream for kernel, _, _ in mixed.pieces]
        return Requests(sizes, events, streams if any(streams) else None)

    @cached_property
    def _questions(self) -> tuple[list[int], list[int]]:
        """The first kernel of each kind with the same numbers, and whose answer each one shares."""
        firsts: dict[Hashable, int] = {}
        shared = []
        for index, (kernel, terms) in enumerate(zip(self.kernels, self.numbers, strict=True)):
            shared.append(firsts.setdefault((kernel.kind, terms), index))
        return sorted(firsts.values()), shared

    def _kernels(self, micro_batch: int) -> tuple[Kernel, ...]:
        sizes_of = self._sizes_of(micro_batch)
        firsts, shared = self._questions
        numbers = {first: tuple(sizes_of(self.numbers[first])) for first in firsts}
        return tuple(
            [kernel.at(numbers[first]) for kernel, first in zip(self.kernels, shared, strict=True)]
        )

    def difference(self, trace: Trace) -> str | None:
        """Return how an executed trace departs from the model's, or None where they are equal."""
        bare = trace if trace.bare is None else trace.bare.trace
        if reason := _misalignment(self.template, bare):
            return reason
        try:
            expected = self.sizes(trace.micro_batch)
            foretold = self._kernels(trace.micro_batch)
        except Misaligned as error:
            return str(error)
        for index, (block, size) in enumerate(zip(bare.blocks, expected, strict=True)):
            if block.size_bytes != size:
                return (
                    f"block {index} ({block.op}, {block.phase}) at micro-batch "
                    f"{trace.micro_batch}: expected {size} bytes, found {block.size_bytes}"
                )
        kernels = () if trace.bare is None else trace.bare.kernels
        if [k.numbers for k in kernels] != [k.numbers for k in foretold]:
            return f"a kernel's arguments at micro-batch {trace.micro_batch} are others"
        return None

    def predicts_start_of(self, trace: Trace) -> bool:
        """Return whether a trace begins as predicted, up to the end of its first micro-batch.

        That part does not depend on the accumulation steps, and every op runs in it.
        """
        trace = trace if trace.bare is None else trace.bare.trace
        template, trace = with_frees_in_order(self.template), with_frees_in_order(trace)
        end = next(
            (mark.event for mark in template.marks if mark.phase in ("inputs", "step")
             and (mark.window, mark.micro_batch) != (0, 0)),
            len(template.events),
        )  # fmt: skip
        if template.events[:end] != trace.events[:end]:
            return False
        try:
            sizes = self.sizes(trace.micro_batch)
        except Misaligned:
            return False
        started = sum(event >= 0 for event in template.events[:end])
        return all(
            (block.op, block.phase, size) == (other.op, other.phase, other.size_bytes)
            for block, size, other in zip(
                template.blocks[:started], sizes, trace.blocks, strict=False
            )
        )

    def peak_bytes(self, micro_batch: int) -> int:
        """Return the most requested bytes alive at once, before the allocator rounds them."""
        trace = self.trace(micro_batch)
        return max(running_bytes(trace.sizes, trace.events), default=0)


_Term = tuple[int, int, int]
"""Base, slope and bend."""

_T = TypeVar("_T", bound=Hashable)


def _distinct(values: Iterable[_T]) -> tuple[list[_T], list[int]]:
    """Return each of many values once, and the place among those of each one."""
    places: dict[_T, int] = {}
    of = [places.setdefault(value, len(places)) for value in values]
    return list(places), of


_ABSENT = -1
"""Stands for the size of a block that a trace does not have."""

_ALONE = 0.1
"""Traces of which more than this share of the bytes has no counterpart are not of one sequence."""

_PERMANENT = frozenset({"parameters", "buffers", "gradients", "optimizer state", "workspace"})
"""What does not grow with the micro-batch."""


@dataclass(frozen=True, slots=True)
class _Interpolation:
    """Fits the sizes of one block; coefficients are times a common denominator."""

    nodes: tuple[int, ...]
    denominator: int
    rounding: Rounding | None

    @classmethod
    def over(cls, nodes: tuple[int, ...], rounding: Rounding | None) -> _Interpolation:
        """Prepare to fit sizes at micro-batches.

        Raises:
            Misaligned: they do not tell how sizes depend on the rounding.
        """
        if rounding is not None:
            bend = _bend(nodes, rounding, nodes[-1])
            if not bend:
                raise Misaligned(f"micro-batches {nodes} do not show how a count is rounded up")
            return cls(nodes, (nodes[1] - nodes[0]) * abs(bend), rounding)
        if len(nodes) == 2:
            return cls(nodes, nodes[1] - nodes[0], None)
        n0, n1, n2 = nodes
        return cls(nodes, (n1 - n0) * (n2 - n1) * (n2 - n0), None)

    def polynomial(self, sizes: Sequence[int]) -> tuple[int, int, int]:
        """Return the polynomial through the sizes at all nodes."""
        if len(sizes) == 2:
            return sizes[0] * self.denominator, sizes[1] - sizes[0], 0
        (n0, n1, n2), (s0, s1, s2) = self.nodes, sizes
        if self.rounding is not None:
            step = _bend(self.nodes, self.rounding, n2)
            bend = (s2 - s0) * (n1 - n0) - (s1 - s0) * (n2 - n0)
            sign = 1 if step > 0 else -1
            return s0 * self.denominator, (s1 - s0) * abs(step), bend * sign
        bend = (s2 - s1) * (n1 - n0) - (s1 - s0) * (n2 - n1)
        return s0 * self.denominator, (s1 - s0) * (n2 - n1) * (n2 - n0), bend

    def line(self, before: int, last: int, *, grows: bool) -> tuple[int, int, int]:
        """Return the line through the two largest sizes, or in proportion to the micro-batch."""
        if not grows:
            slope = 0
        elif before == _ABSENT:
            slope = last * self.denominator // self.nodes[-1]
        else:
            rise = max(0, last - before)
            slope = rise * self.denominator // (self.nodes[-1] - self.nodes[-2])
        return last * self.denominator - slope * (self.nodes[-1] - self.nodes[0]), slope, 0


def _bend(nodes: Sequence[int], rounding: Rounding | None, micro_batch: int) -> int:
    """Return the part of sizes that is no line, which is zero at the first two nodes."""
    first, second = nodes[:2]
    if rounding is None:
        return (micro_batch - first) * (micro_batch - second)
    count = rounding.at(first)
    rise = rounding.at(second) - count
    return (rounding.at(micro_batch) - count) * (second - first) - rise * (micro_batch - first)


def _rounding(traces: Sequence[Trace]) -> Rounding | None:
    """Return the one way in which counts of traces depart from lines.

    Raises:
        Misaligned: there are several.
    """
    found = {count.departure for count in _counts(traces)}
    if len(found) > 1:
        raise Misaligned(f"{len(found)} counts are rounded up, each in its own way")
    return next(iter(found), None)


def _counts(traces: Sequence[Trace]) -> list[Rounding]:
    nodes = [trace.micro_batch for trace in traces]
    try:
        return roundings(nodes, [trace.parts for trace in traces])
    except ValueError as error:
        raise Misaligned(str(error)) from error


def nodes_for(traces: Sequence[Trace], limit: int) -> tuple[int, ...]:
    """Return the micro-batches that a model has to be fitted to, by traces at two small ones.

    They are these two, unless a count is rounded up: then three that show how, and at which there
    are two of what is counted, because at one the order of events and strides often differ.

    Raises:
        Misaligned: one of them is above the limit.
    """
    first, second = (trace.micro_batch for trace in traces)
    rounding = _rounding(traces)
    if rounding is None:
        return first, second
    counts = _counts(traces)
    for size in range(first, limit):
        if all(count.at(size) >= _FEWEST for count in counts):
            above = range(size + 2, limit + 1)
            third = next((n for n in above if _bend((size, size + 1), rounding, n)), None)
            if third is not None:
                return size, size + 1, third
            break
    raise Misaligned(f"no micro-batches up to {limit} show how a count is rounded up")


_FEWEST = 2
"""Of what is counted, there are as many at the sizes that a model is fitted to, at least."""


def _numbers(
    kernels: Sequence[Sequence[Kernel]], interpolation: _Interpolation, nodes: Sequence[int]
) -> Iterator[tuple[_Term, ...]]:
    """Yield the terms of the numbers of each kernel.

    Raises:
        Misaligned: the traces have other kernels.
    """
    if len(set(map(len, kernels))) > 1:
        raise Misaligned(f"traces at micro-batch {nodes[0]} and {nodes[-1]} run other kernels")
    for same in zip(*kernels, strict=True):
        if any(kernel.place != same[-1].place for kernel in same):
            raise Misaligned(
                f"traces at micro-batch {nodes[0]} and {nodes[-1]} differ in a kernel "
                f"({same[-1].name}, {same[-1].phase})"
            )
        rows = zip(*(kernel.numbers for kernel in same), strict=True)
        yield tuple(map(interpolation.polynomial, rows))


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
    for place in range(start, min(start + SCRATCH_EVENTS, len(events))):
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


def _sizes_in_common(
    small: Trace, large: Trace, scratch: frozenset[int], difference: str
) -> list[int]:
    """Return, for each block of the larger trace, the size of its counterpart in the smaller one.

    Raises:
        Misaligned: too much of either has no counterpart.
    """
    if small.accumulation_steps != large.accumulation_steps:
        raise Misaligned(difference)
    pairs = counterparts(small, large)
    sizes = [_ABSENT] * len(large.blocks)
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


def _misalignment(first: Trace, second: Trace) -> str | None:
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
