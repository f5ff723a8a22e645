"""Sizes as polynomials in the micro-batch, through those at two or three of them, or at one.

Invariant: a polynomial gives the sizes at all fitted micro-batches exactly, in integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from autobatch.memory.alignment import ABSENT, Misaligned
from autobatch.memory.rounding import Rounding, roundings
from autobatch.memory.trace import Trace

__all__ = ["Interpolation", "Term", "nodes_for", "rounding_of"]

Term = tuple[int, int, int]
"""Base, slope and bend."""

_FEWEST = 2
"""Of what is counted, there are as many at the sizes that a model is fitted to, at least."""


@dataclass(frozen=True, slots=True)
class Interpolation:
    """Fits and evaluates sizes; make one with `over`.

    Newton's divided differences over a common denominator: with nodes n0 < n1 < n2,
    size(n) = (base + slope * (n - n0) + bend * (n - n0) * (n - n1)) / denominator.
    Where there is a rounding, its departure from the line through n0 and n1 is in place of the
    product: it is zero there as well. With one node, which is a prime, the product is the square of
    (n - n0).

    Attributes:
        nodes: the fitted micro-batches, ascending.
        denominator: positive.
        rounding: the count that is rounded up, on which sizes depend; None where there is none.
    """

    nodes: tuple[int, ...]
    denominator: int
    rounding: Rounding | None

    @classmethod
    def over(cls, nodes: tuple[int, ...], rounding: Rounding | None) -> Interpolation:
        """Prepare to fit sizes at micro-batches.

        Raises:
            Misaligned: they do not tell how sizes depend on the rounding.
        """
        if rounding is not None:
            bend = _bend(nodes, rounding, nodes[-1])
            if not bend:
                raise Misaligned(f"micro-batches {nodes} do not show how a count is rounded up")
            return cls(nodes, (nodes[1] - nodes[0]) * abs(bend), rounding)
        if len(nodes) == 1:
            return cls(nodes, nodes[0] ** 2, None)
        if len(nodes) == 2:
            return cls(nodes, nodes[1] - nodes[0], None)
        n0, n1, n2 = nodes
        return cls(nodes, (n1 - n0) * (n2 - n1) * (n2 - n0), None)

    def polynomial(self, sizes: Sequence[int]) -> Term:
        """Return the polynomial through the sizes at all nodes.

        With one node, which is a prime, what it divides is proportional to the micro-batch, and
        all else constant.
        """
        if len(sizes) == 1:
            (size,), (node,) = sizes, self.nodes
            return size * self.denominator, 0 if size % node else size * node, 0
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

    def constant(self, size: int) -> Term:
        """Return what is this size at every micro-batch."""
        return size * self.denominator, 0, 0

    def square(self, size: int) -> Term:
        """Return what is proportional to the square of the micro-batch, and this at one node."""
        return size * self.denominator, 2 * size * self.nodes[0], size

    def line(self, before: int, last: int, *, grows: bool) -> Term:
        """Return the line through the two largest sizes, or in proportion to the micro-batch."""
        if not grows:
            slope = 0
        elif before == ABSENT:
            slope = last * self.denominator // self.nodes[-1]
        else:
            rise = max(0, last - before)
            slope = rise * self.denominator // (self.nodes[-1] - self.nodes[-2])
        return last * self.denominator - slope * (self.nodes[-1] - self.nodes[0]), slope, 0

    def at(self, micro_batch: int) -> Callable[[Iterable[Term]], list[int]]:
        """Return what evaluates polynomials at a micro-batch, times the denominator."""
        step = micro_batch - self.nodes[0]
        bend_step = _bend(self.nodes, self.rounding, micro_batch)

        def values_of(terms: Iterable[Term]) -> list[int]:
            return [base + slope * step + bend * bend_step for base, slope, bend in terms]

        return values_of


def _bend(nodes: Sequence[int], rounding: Rounding | None, micro_batch: int) -> int:
    """Return the part of sizes that is no line, which is zero at the first two nodes."""
    if len(nodes) == 1:
        return int((micro_batch - nodes[0]) ** 2)
    first, second = nodes[:2]
    if rounding is None:
        return (micro_batch - first) * (micro_batch - second)
    count = rounding.at(first)
    rise = rounding.at(second) - count
    return (rounding.at(micro_batch) - count) * (second - first) - rise * (micro_batch - first)


def rounding_of(traces: Sequence[Trace]) -> Rounding | None:
    """Return the one way in which counts of traces depart from lines.

    Raises:
        Misaligned: there are several.
    """
    found = {count.departure for count in _counts(traces)} if len(traces) > 1 else set()
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
    rounding = rounding_of(traces)
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
