"""One plan for all ranks of a process group.

Invariant: every rank makes the same collective calls, also where its own search failed; all of
them end with the same split, or with an error each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.distributed as dist

from autobatch.errors import AutobatchError
from autobatch.plan import Plan

__all__ = ["agreed", "ranks_here"]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one rank tells the others; a failure in words instead of a plan."""

    ceiling: int = 0
    micro_batch: int = 0
    windows: tuple[tuple[int, ...], ...] = ()
    failure: str | None = None


def ranks_here() -> int:
    """Return the number of ranks of the process group that this process belongs to."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def agreed(tuned: Callable[[int | None], Plan]) -> Plan:
    """Return a plan with the same split on all ranks: that of the rank with the least memory.

    Args:
        tuned: `tuned(limit)` searches on this rank; `limit` is the largest micro-batch to consider,
            or None.

    Raises:
        AutobatchError: the search failed here, or on another rank.
    """
    plan, limit = None, None
    ceilings: list[int] = []
    while True:
        error: Exception | None = None
        if plan is None or (limit is not None and plan.micro_batch > limit):
            try:
                plan = tuned(limit)
            except Exception as failure:
                error = failure
        answers = _gathered(plan, error)
        if error is not None:
            raise error
        for rank, answer in enumerate(answers):
            if answer.failure is not None:
                raise AutobatchError(f"there is no plan on rank {rank}: {answer.failure}")
        assert plan is not None
        ceilings = ceilings or [answer.ceiling for answer in answers]
        if len({answer.windows for answer in answers}) == 1:
            return _remarked(plan, ceilings)
        sizes = {answer.micro_batch for answer in answers}
        limit = min(sizes)
        if len(sizes) == 1:  # the same size, come by in two ways
            plan = None


def _gathered(plan: Plan | None, error: Exception | None) -> list[_Answer]:
    if error is not None:
        own = _Answer(failure=f"{type(error).__name__}: {error}")
    else:
        assert plan is not None
        own = _Answer(plan.ceiling_at_least, plan.micro_batch, plan.split.windows)
    answers = [own] * ranks_here()
    dist.all_gather_object(answers, own)
    return answers


def _remarked(plan: Plan, ceilings: list[int]) -> Plan:
    if len(set(ceilings)) == 1:
        return plan
    rank = ceilings.index(min(ceilings))
    remark = (
        f"the ranks' ceilings are {', '.join(map(str, ceilings))}: all take the split of rank "
        f"{rank}, which has the least memory"
    )
    return replace(plan, warnings=(*plan.warnings, remark))
