"""Predicts the trace at any micro-batch from one, two or three traces that were executed.

Invariant: the largest fitted trace is reproduced exactly, block by block, the others as well where
they differ in sizes alone, and every size is computed in integers. Two traces give sizes affine in
the micro-batch, three give quadratic ones; or, where elements were spread equally over parts and
each part was rounded up, sizes affine in the micro-batch and in that count. One trace, at a prime
micro-batch, gives sizes that are constant, or proportional to the micro-batch or to its square: a
conjecture, until an execution confirms it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from autobatch.memory.alignment import (
    ABSENT,
    Misaligned,
    misalignment,
    scratch_blocks,
    sizes_in_common,
    with_frees_in_order,
)
from autobatch.memory.interpolation import Interpolation, Term, rounding_of
from autobatch.memory.pairs import pairs_samples
from autobatch.memory.scratch import interleaved, with_scratch
from autobatch.memory.trace import (
    UNLABELLED,
    Allocation,
    Bare,
    Category,
    Kernel,
    Label,
    Requests,
    Trace,
)

__all__ = ["PERMANENT", "Refuted", "TraceModel"]

PERMANENT: frozenset[Category] = frozenset(
    ("parameters", "buffers", "gradients", "optimizer_state", "workspace")
)
"""What does not grow with the micro-batch."""


class Refuted(Misaligned):
    """Traces are one sequence of allocations and frees, but their sizes follow another rule."""


@dataclass(frozen=True, kw_only=True)
class TraceModel:
    """Sizes of every block as a polynomial in the micro-batch; make one with `fit`.

    Attributes:
        template: the trace at the largest fitted micro-batch.
        interpolation: evaluates terms.
        terms: of the size of each block of the template.
        kernels: those of the template that may take scratch.
        numbers: terms of the numbers of each kernel.
        labels: of each block of the template, in each fitted trace; empty where a trace lacks it.
        is_exact: whether the traces differed in sizes alone. Then a size that is predicted to be
            negative, or no whole number, shows that sizes follow another rule.
    """

    template: Trace
    interpolation: Interpolation
    terms: tuple[Term, ...]
    kernels: tuple[Kernel, ...] = ()
    numbers: tuple[tuple[Term, ...], ...] = ()
    labels: tuple[tuple[Label, ...], ...] = field(default=(), compare=False, repr=False)
    is_exact: bool = True

    @classmethod
    def fit(cls, traces: Sequence[Trace], *, kernels_may_vary: bool = False) -> TraceModel:
        """Align traces at different micro-batches and fit every block's size.

        Args:
            traces: of the same workload: two, three, or one at a prime micro-batch.
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
            ValueError: there are not one, two or three different micro-batches.
        """
        whole = sorted(traces, key=lambda trace: trace.micro_batch)
        ordered = [trace if trace.bare is None else trace.bare.trace for trace in whole]
        nodes = tuple(trace.micro_batch for trace in ordered)
        if len(nodes) not in (1, 2, 3) or len(set(nodes)) != len(nodes):
            raise ValueError(f"a trace model needs 1 to 3 different micro-batches, got {nodes}")
        last = ordered[-1]
        columns: list[Sequence[int]] = []
        labels: list[tuple[Label, ...]] = []
        scratch = scratch_blocks(last) if kernels_may_vary else frozenset()
        for trace in ordered[:-1]:
            reason = misalignment(trace, last)
            if reason is None:
                columns.append(trace.sizes)
                labels.append(tuple([block.label for block in trace.blocks]))
            elif kernels_may_vary:
                columns.append(sizes_in_common(trace, last, scratch, reason))
                labels.append((UNLABELLED,) * len(last.blocks))
            else:
                raise Misaligned(reason)
        interpolation = Interpolation.over(nodes, rounding_of(ordered))
        terms: list[Term] = []
        rows = zip(*columns, last.sizes, strict=True)
        for index, (block, row) in enumerate(zip(last.blocks, rows, strict=True)):
            if len(row) == 1 and block.category in PERMANENT:
                terms.append(interpolation.constant(*row))
            elif len(row) == 1 and pairs_samples(block.label.shape, *nodes):
                terms.append(interpolation.square(*row))
            elif index in scratch or ABSENT in row:
                grows = block.category not in PERMANENT
                terms.append(interpolation.line(*row[-2:], grows=grows))
            else:
                terms.append(interpolation.polynomial(row))
        kernels = [() if trace.bare is None else trace.bare.kernels for trace in whole]
        return cls(
            template=last,
            interpolation=interpolation,
            terms=tuple(terms),
            kernels=kernels[-1],
            numbers=tuple(_numbers(kernels, interpolation)),
            labels=(*labels, tuple([block.label for block in last.blocks])),
            is_exact=not kernels_may_vary,
        )

    @property
    def nodes(self) -> tuple[int, ...]:
        """The fitted micro-batches, ascending."""
        return self.interpolation.nodes

    @property
    def degree(self) -> int:
        """2 if any block's size is quadratic in the micro-batch, else 1."""
        bends = any(bend for _, _, bend in self.terms)
        return 2 if bends and self.interpolation.rounding is None else 1

    def quadratic_share(self, micro_batch: int) -> float:
        """Return the share of all bytes at a size that quadratic terms make up.

        A small share comes from kernels that pad to a multiple; their memory is not quadratic. Of a
        model that is not exact only what departs from a line between its sizes counts, because
        between sizes that are close a little noise bends much.
        """
        if self.degree == 1:
            return 0.0
        bends = sum(abs(bend) for _, _, bend in self.terms)
        first, *others = self.nodes
        departure = abs((micro_batch - first) * (micro_batch - (others or [first])[0]))
        squares = bends * (micro_batch**2 if self.is_exact else departure)
        return squares / self.interpolation.denominator / max(sum(self.sizes(micro_batch)), 1)

    def sizes(self, micro_batch: int) -> list[int]:
        """Return the requested bytes of each block of the template.

        Where the model is not exact, they are those to the nearest byte, and at least 0.

        Raises:
            Refuted: the model is exact, and a size would be no whole number, or negative.
        """
        terms, places = self._distinct_terms
        if self.is_exact:
            values = self._sizes_of(micro_batch)(terms)
        else:
            values = [max(0, value) for value in self._nearest(micro_batch)(terms)]
        return [values[place] for place in places]

    @cached_property
    def _distinct_terms(self) -> tuple[list[Term], list[int]]:
        """The terms of blocks, each once, and the place among them of each block's."""
        places: dict[Term, int] = {}
        of = [places.setdefault(terms, len(places)) for terms in self.terms]
        return list(places), of

    def _nearest(self, micro_batch: int) -> Callable[[Iterable[Term]], list[int]]:
        """Return what evaluates terms to the nearest whole numbers."""
        values_of, denominator = self.interpolation.at(micro_batch), self.interpolation.denominator
        half = denominator // 2
        return lambda terms: [(value + half) // denominator for value in values_of(terms)]

    def _sizes_of(self, micro_batch: int) -> Callable[[Sequence[Term]], list[int]]:
        """Return what evaluates terms of sizes and strides.

        It raises Refuted where one that varies is negative or, in an exact model, no whole
        number.
        """
        values_of, denominator = self.interpolation.at(micro_batch), self.interpolation.denominator
        is_exact = self.is_exact
        half = 0 if is_exact else denominator // 2

        def sizes_of(terms: Sequence[Term]) -> list[int]:
            sizes = []
            for (_, slope, bend), value in zip(terms, values_of(terms), strict=True):
                size, left = divmod(value + half, denominator)
                varies = slope or bend  # a dimension that is counted from the end is -1 throughout
                if varies and (size < 0 or (left and is_exact)):
                    raise Refuted(
                        f"what ran at micro-batches {', '.join(map(str, self.nodes))} foretells "
                        f"{(value + half) / denominator:,g} at micro-batch {micro_batch}, which no "
                        "size is"
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
        nearest, polynomial = self._nearest(micro_batch), self.interpolation.polynomial
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
                    label = replace(last, shape=tuple(nearest(map(polynomial, dims))))
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
        if reason := misalignment(self.template, bare):
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


def _numbers(
    kernels: Sequence[Sequence[Kernel]], interpolation: Interpolation
) -> Iterator[tuple[Term, ...]]:
    """Yield the terms of the numbers of each kernel.

    Raises:
        Misaligned: the traces have other kernels.
    """
    nodes = interpolation.nodes
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
