"""One plan for all ranks of a process group.

Invariant: every rank makes the same collective call, also where its own search failed; none is left
waiting for another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist

from autobatch.errors import WorkloadError
from autobatch.plan.plan import Plan
from autobatch.support.ranks import ranks_here

__all__ = ["agreed"]


def agreed(make: Callable[[], Plan]) -> Plan:
    """Return the plan of the rank that holds least, the same on every rank.

    All ranks have to call it, and each makes a plan of its own. Without others, just the plan.

    Raises:
        WorkloadError: another rank's failure; this rank's own is raised as it is.
    """
    ranks = ranks_here()
    if ranks == 1:
        return make()
    failure: Exception | None = None
    try:
        outcome: tuple[bool, str] = (True, make().to_json())
    except Exception as error:
        failure = error
        outcome = (False, f"{type(error).__name__}: {error}")
    outcomes: list[tuple[bool, str]] = [outcome] * ranks
    dist.all_gather_object(outcomes, outcome)
    if failure is not None:
        raise failure
    for rank, (made, text) in enumerate(outcomes):
        if not made:
            raise WorkloadError(f"rank {rank} found no plan ({text}): look at its own message")
    plans = [Plan.from_json(text) for _, text in outcomes]
    least = min(plans, key=lambda plan: plan.ceiling_at_least)
    ceilings = [plan.ceiling_at_least for plan in plans]
    if len(set(ceilings)) == 1:
        return least
    note = (
        f"the ranks' ceilings are {', '.join(f'{n:,}' for n in ceilings)}: this is the plan of "
        f"rank {plans.index(least)}, which holds least"
    )
    return replace(least, warnings=(*least.warnings, note))
