"""What finished trials tell of those that have not run: what cannot fit, and what must be worse.

Two things are taken from how training works. Memory never falls when the micro-batch grows, with
all else the same. The time of an update never falls by more than a small margin when its
micro-batches get smaller, because the same samples then take more launches and move the weights
more often. So a configuration needs at least the memory of a smaller micro-batch, and at least the
time of a larger one. Where another trial is no slower than that time and no larger than that
memory, it is at least as good, whatever a run would show.

Invariant: what is pruned is not on the front of what would have run, up to the margin.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from autobatch.records.sweep import SweepTrial
from autobatch.support.units import format_bytes, format_seconds

__all__ = ["Known"]

_FAILURES = 2
"""So many sizes of one combination fail before the others are given up; one size alone may fail
for a reason of its own, as BatchNorm does at one sample."""


@dataclass(slots=True)
class _Combination:
    """What is known of one combination of settings, by micro-batch."""

    finished: dict[int, SweepTrial] = field(default_factory=dict)
    too_large: dict[int, SweepTrial] = field(default_factory=dict)
    failed: dict[int, SweepTrial] = field(default_factory=dict)
    refused: str | None = None


class Known:
    """What a study's trials tell."""

    def __init__(self, trials: Iterable[SweepTrial], margin: float) -> None:
        """Take the trials that ended, and by which share larger micro-batches may be slower."""
        self._margin = margin
        self._finished: list[SweepTrial] = []
        self._combinations: dict[tuple[tuple[str, str], ...], _Combination] = defaultdict(
            _Combination
        )
        for trial in trials:
            one = self._combinations[tuple(sorted(trial.settings.items()))]
            if trial.outcome == "finished":
                one.finished[trial.micro_batch] = trial
                self._finished.append(trial)
            elif trial.outcome == "does not fit":
                one.too_large[trial.micro_batch] = trial
            elif trial.outcome == "failed":
                one.failed[trial.micro_batch] = trial
            elif trial.outcome == "cannot be had" and trial.executions:
                one.refused = trial.reason  # by a lever, which found it in a run of any size

    def why_not(self, combination: tuple[tuple[str, str], ...], micro_batch: int) -> str | None:
        """Say why a configuration need not run; None where it has to."""
        one = self._combinations[combination]
        if smaller := [size for size in one.too_large if size <= micro_batch]:
            return f"micro-batch {min(smaller):,} does not fit"
        if one.refused is not None:
            return one.refused
        if len(one.failed) >= _FAILURES and not one.finished:
            return f"micro-batches {_and(sorted(one.failed))} failed"
        below = [size for size in one.finished if size < micro_batch]
        above = [size for size in one.finished if size > micro_batch]
        if not below or not above:
            return None
        seconds = one.finished[min(above)].seconds
        reserved = one.finished[max(below)].reserved_bytes
        assert seconds is not None and reserved is not None
        least = seconds * (1 - self._margin)
        for other in self._finished:
            assert other.seconds is not None and other.reserved_bytes is not None
            if other.seconds <= least and other.reserved_bytes <= reserved:
                return (
                    f"trial {other.number} is faster ({format_seconds(other.seconds)}, this at "
                    f"least {format_seconds(least)}) and no larger "
                    f"({format_bytes(other.reserved_bytes)}, this at least "
                    f"{format_bytes(reserved)})"
                )
        return None

    def next_size(
        self,
        combination: tuple[tuple[str, str], ...],
        open_sizes: Sequence[int],
        guess: int | None,
    ) -> tuple[int, int]:
        """Return which micro-batch of a combination to run next.

        First the largest that fits is looked for, which is mostly the fastest; then comes the
        smallest, which takes least memory; between the two, others can be pruned.

        Args:
            combination: of settings.
            open_sizes: micro-batches that have not run and are not pruned, the largest first.
            guess: the largest that fits with other settings.

        Returns:
            The stage, 0 to 2, of which lower ones matter more, and the size.
        """
        one = self._combinations[combination]
        largest = max(one.finished, default=None)
        if largest is None:
            tried = {**one.too_large, **one.failed}
            if not tried and guess in open_sizes:
                assert guess is not None
                return 0, guess
            return 0, open_sizes[0] if not tried else open_sizes[len(open_sizes) // 2]
        if larger := [size for size in open_sizes if size > largest]:
            is_first = largest == guess and len(one.finished) == 1
            return 0, larger[-1] if is_first else larger[len(larger) // 2]
        if min(open_sizes) < min(one.finished):
            return 1, min(open_sizes)
        return 2, open_sizes[len(open_sizes) // 2]

    def guess(self) -> int | None:
        """Return the largest micro-batch that fits with the first settings of which one does."""
        found = (max(one.finished) for one in self._combinations.values() if one.finished)
        return next(found, None)


def _and(sizes: Sequence[int]) -> str:
    return ", ".join(f"{size:,}" for size in sizes[:-1]) + f" and {sizes[-1]:,}"
