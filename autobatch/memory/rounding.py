"""Counts that are rounded up, as functions of the micro-batch.

A simulation spreads elements equally over parts (rows over experts), and every part has a whole
number of them. Of two choices a sample, each of four experts gets 1, 2, 2, 3, 3, 4 rows of 2, 3, 4,
5, 6, 7 samples: no line and no quadratic follows them, so sizes that such a count decides need it
beside the micro-batch.

Invariant: fractions are exact, so that a count is the same in a run and in what foretells it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["Rounding", "part_of", "rounded_up", "roundings"]

_MOST_PARTS = 10**7
"""A share is mostly a fraction of two small numbers, which 16 digits tell apart from all others."""

_NEAR = 1e-6
"""A share of more elements than that is one whose product with them is this near to a whole one."""


def part_of(elements: int, share: float) -> Fraction:
    """Return which part of some elements a share of them is, before it is rounded up.

    >>> part_of(10, 1 / 3)
    Fraction(10, 3)
    """
    nearest = round(elements * share)
    if abs(elements * share - nearest) < _NEAR:
        return Fraction(nearest)
    return elements * Fraction(share).limit_denominator(_MOST_PARTS)


def rounded_up(part: Fraction) -> int:
    """Return the least whole number that is not below a part.

    >>> rounded_up(Fraction(10, 3))
    4
    """
    return -(-part.numerator // part.denominator)


@dataclass(frozen=True, slots=True)
class Rounding:
    """A part that follows a line in the micro-batch, and is rounded up.

    Attributes:
        base: the part of no samples.
        slope: by how much it grows with each sample.
    """

    base: Fraction
    slope: Fraction

    def at(self, micro_batch: int) -> int:
        """Return the count at a micro-batch.

        >>> experts = Rounding(Fraction(0), Fraction(2, 4))
        >>> [experts.at(n) for n in range(2, 8)]
        [1, 2, 2, 3, 3, 4]
        """
        return rounded_up(self.base + self.slope * micro_batch)

    @property
    def departure(self) -> Rounding:
        """The same but for a line: what is the same for counts that depart alike from one."""
        return Rounding(self.base % 1, self.slope % 1)


def roundings(nodes: Sequence[int], parts: Sequence[Sequence[Fraction]]) -> list[Rounding]:
    """Return the counts that follow no line.

    Args:
        nodes: micro-batches, two or more.
        parts: those of each micro-batch, in the same order.

    Raises:
        ValueError: there are other parts at other micro-batches, or one does not follow a line.

    >>> len(roundings([2, 3], [[Fraction(2, 4), Fraction(6)], [Fraction(3, 4), Fraction(9)]]))
    1
    """
    found = []
    for same in zip(*parts, strict=True):
        slope = (same[1] - same[0]) / (nodes[1] - nodes[0])
        base = same[0] - slope * nodes[0]
        if any(part != base + slope * node for node, part in zip(nodes, same, strict=True)):
            raise ValueError(f"a part of elements follows no line: {same} at {tuple(nodes)}")
        if slope.denominator > 1:  # else it is rounded alike everywhere
            found.append(Rounding(base, slope))
    return found
