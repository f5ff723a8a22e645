"""Divide an effective batch into micro-batches over ranks and accumulation steps, exactly.

Invariant: the windows of all ranks sum to the target; sizes differ by at most one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from autobatch.errors import UsageError
from autobatch.support.wording import count

__all__ = ["Split", "split", "uniform_alternatives"]

_MOST_MICRO_BATCHES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Micro-batches of one training window.

    Attributes:
        target: the effective batch asked for.
        windows: for each rank, the micro-batch of every accumulation step, in order.
    """

    target: int
    windows: tuple[tuple[int, ...], ...]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.windows)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of each rank between two optimizer updates."""
        return len(self.windows[0])

    @property
    def micro_batch(self) -> int:
        """The largest micro-batch of any rank at any step: the one that must fit."""
        return max(map(max, self.windows))

    @property
    def effective_batch(self) -> int:
        """Samples of one optimizer update over all ranks; always the target."""
        return sum(map(sum, self.windows))

    @property
    def uniform(self) -> bool:
        """Whether every micro-batch has the same size."""
        return self.micro_batch * self.accumulation_steps * self.world_size == self.target


def split(target: int, *, ceiling: int, world_size: int = 1) -> Split:
    """Divide `target` samples into the fewest micro-batches that fit, of one size where possible.

    With k the fewest accumulation steps that fit, the split with one size and the fewest steps
    up to 2k is taken; where none is exact, k steps whose sizes differ by at most one. Larger
    micro-batches come first, so the ranks' totals differ by at most one as well.

    Args:
        target: effective batch, in samples per optimizer update over all ranks.
        ceiling: largest micro-batch that fits on one rank.
        world_size: number of ranks.

    Raises:
        UsageError: a number is not a positive integer, or the target cannot give every rank the
            same number of non-empty micro-batches.

    >>> split(256, ceiling=100).windows
    ((64, 64, 64, 64),)
    >>> split(257, ceiling=100, world_size=2).windows
    ((65, 64), (64, 64))
    """
    _require_positive("the target effective batch", target)
    _require_positive("the ceiling", ceiling)
    _require_positive("the world size", world_size)
    if target < world_size:
        raise UsageError(
            f"an effective batch of {target} leaves some of {world_size} GPUs without a sample: "
            f"use a target of at least {world_size}, or at most {count(target, 'GPU')}"
        )
    fewest = _ceil_div(target, world_size * ceiling)
    steps = _uniform_steps(target, ceiling, world_size) or fewest
    slots = steps * world_size
    if slots > _MOST_MICRO_BATCHES:
        raise UsageError(
            f"an effective batch of {target} at micro-batch {ceiling} takes {slots} micro-batches "
            f"per update, more than {_MOST_MICRO_BATCHES}: use a smaller target"
        )
    if target < slots:
        raise UsageError(
            f"an effective batch of {target} cannot be divided evenly: each of {world_size} GPUs "
            f"fits one sample at a time, so use a multiple of {world_size}, such as "
            f"{slots - world_size} or {slots}"
        )
    size, larger = divmod(target, slots)
    windows = tuple(
        tuple(size + (step * world_size + rank < larger) for step in range(steps))
        for rank in range(world_size)
    )
    return Split(target=target, windows=windows)


def uniform_alternatives(planned: Split, *, ceiling: int) -> tuple[Split, ...]:
    """Return splits of one size, for trainers that cannot run an uneven one.

    These are the uniform splits of the nearest effective batches below (if any) and above the
    target, on the same ranks and below the same ceiling; or the split itself if it is uniform.

    >>> [s.target for s in uniform_alternatives(split(257, ceiling=100), ceiling=100)]
    [256, 258]
    """
    if planned.uniform:
        return (planned,)
    world_size = planned.world_size
    below, above = range(planned.target - 1, 0, -1), itertools.count(planned.target + 1)
    nearest = (
        next((t for t in targets if _uniform_steps(t, ceiling, world_size)), None)
        for targets in (below, above)
    )
    return tuple(split(t, ceiling=ceiling, world_size=world_size) for t in nearest if t)


def _uniform_steps(target: int, ceiling: int, world_size: int) -> int | None:
    """Return the fewest steps k' of an exact uniform split, if that is at most twice the fewest."""
    per_rank, rest = divmod(target, world_size)
    if rest:
        return None
    fewest = _ceil_div(per_rank, ceiling)
    smallest_size = _ceil_div(per_rank, 2 * fewest)
    sizes = range(per_rank // fewest, smallest_size - 1, -1)
    return next((per_rank // size for size in sizes if per_rank % size == 0), None)


def _require_positive(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{what} is {value!r}: give a whole number of at least 1")


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
