"""Find the largest micro-batch that fits by asking for sizes and being told the answers.

Invariant: no size is asked twice, and the ceiling is always a size that was told to fit. When
`ask` returns None, the next size was told not to fit, or the limit was reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

__all__ = ["CeilingSearch"]

_TRUSTED_ANSWERS = 12
"""From so many answers on, peaks have misled the search, and it only doubles and bisects."""

_REACH = 256
"""How far beyond the largest known size a line is followed: its slope carries rounding."""


@dataclass(frozen=True, slots=True)
class _Answer:
    fits: bool
    peak_bytes: int | None


class CeilingSearch:
    """Ask/tell search for the largest size in [1, limit] that fits.

    Told peaks predict where the budget is crossed: two sizes give a line, so memory that is
    affine in the micro-batch takes four asks, and fewer if known sizes are told first. Sizes
    that miss the crossing move away from it in doubled strides. Whatever the answers are, at
    most `2 * log2(limit)` asks follow the first twelve answers. Where memory is not monotone, the
    ceiling is a boundary (n fits, n + 1 does not), not necessarily the highest one.

    >>> search = CeilingSearch(limit=1000, budget_bytes=10_000)
    >>> while (size := search.ask()) is not None:
    ...     peak_bytes = 500 + 30 * size
    ...     search.tell(size, fits=peak_bytes <= 10_000, peak_bytes=peak_bytes)
    >>> search.ceiling
    316
    """

    def __init__(self, *, limit: int, budget_bytes: int, look_above: int = 0) -> None:
        """Start with nothing known.

        Args:
            limit: largest size to consider, at least 1.
            budget_bytes: what a peak may reach; it guides the guesses only, `tell` decides.
            look_above: how many sizes beyond the first one that does not fit to try as well.

        Raises:
            ValueError: the limit is below 1.
        """
        if limit < 1:
            raise ValueError(f"the search limit is {limit}: it must be at least 1")
        self._limit = limit
        self._budget_bytes = budget_bytes
        self._look_above = look_above
        self._answers: dict[int, _Answer] = {}
        self._asked: int | None = None
        self._last_fitted: bool | None = None
        self._stride = 1

    @property
    def ceiling(self) -> int:
        """The largest size told to fit; 0 when there is none."""
        return max((size for size, answer in self._answers.items() if answer.fits), default=0)

    @property
    def limit_reached(self) -> bool:
        """Whether the limit itself fits, so that the true ceiling may be higher."""
        return self.ceiling == self._limit

    def ask(self) -> int | None:
        """Return the next size to try, or None when the ceiling is known."""
        low, high = self._bracket()
        if high - low == 1:
            self._asked = self._size_above(high)
        elif (guess := self._guess(low, high)) is not None:
            self._asked = guess
        elif high > self._limit:
            self._asked = min(2 * max(low, 1), self._limit)
        else:
            self._asked = (low + high) // 2
        return self._asked

    def tell(self, size: int, *, fits: bool, peak_bytes: int | None) -> None:
        """Record whether a size fits, asked for or not, and its peak where that is known.

        Raises:
            ValueError: the size lies outside [1, limit].
        """
        if not 1 <= size <= self._limit:
            raise ValueError(f"size {size} lies outside the search range 1 to {self._limit}")
        if size == self._asked and len(self._answers) > 1:
            self._stride = 2 * self._stride if fits == self._last_fitted else 1
            self._last_fitted = fits
        self._answers[size] = _Answer(fits, peak_bytes)

    def _bracket(self) -> tuple[int, int]:
        """Return the largest size that fits and the smallest one above that does not."""
        low = self.ceiling
        misfits = (n for n, answer in self._answers.items() if not answer.fits and n > low)
        return low, min(misfits, default=self._limit + 1)

    def _guess(self, low: int, high: int) -> int | None:
        """Return a size strictly between `low` and `high` where the peaks suggest the ceiling."""
        if len(self._answers) >= _TRUSTED_ANSWERS:
            return None
        crossing = self._crossing(low)
        if crossing is None:
            return None
        if self._last_fitted:
            crossing = max(crossing, low + self._stride)
        elif self._last_fitted is False and high in self._answers:
            crossing = min(crossing, high - self._retreat(low, high))
        return min(max(crossing, low + 1), high - 1)

    def _retreat(self, low: int, high: int) -> int:
        """Return how far below a size that did not fit to stay."""
        if self._answers[high].peak_bytes is not None:
            return self._stride
        # Nothing was learned but that the line is wrong: step back a little, then by scale.
        return (high - low) // 16 if self._stride == 1 else high - isqrt(low * high)

    def _crossing(self, low: int) -> int | None:
        """Return the last size below the budget on a line through two known peaks."""
        known = sorted((n, a.peak_bytes) for n, a in self._answers.items() if a.peak_bytes)
        below = [point for point in known if point[0] <= low]
        above = [point for point in known if point[0] > low]
        if below and above:
            (n0, peak0), (n1, peak1) = below[-1], above[0]
        elif len(known) > 1:
            # The widest base: rounding of the peaks tilts the line least.
            (n0, peak0), (n1, peak1) = known[0], known[-1]
        elif below:
            # Half the budget at most, as peak(c * n) <= c * peak(n): part of it does not grow.
            n, peak = below[0]
            return n * self._budget_bytes // (2 * peak)
        else:
            return None
        if peak1 <= peak0:
            return None
        crossing = n0 + (self._budget_bytes - peak0) * (n1 - n0) // (peak1 - peak0)
        return min(crossing, _REACH * n1)

    def _size_above(self, misfit: int) -> int | None:
        """Return the first untried size of the few to try beyond the first that does not fit."""
        last = min(misfit + self._look_above, self._limit)
        return next((n for n in range(misfit + 1, last + 1) if n not in self._answers), None)
