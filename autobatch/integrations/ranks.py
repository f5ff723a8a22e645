"""One plan for all ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from autobatch.errors import WorkloadError
from autobatch.plan import Plan

__all__ = ["agreed"]


def agreed(make: Callable[[], Plan]) -> Plan:
    """Return the plan of the rank that holds least, the same on every rank.

    Without a process group, just the plan. All ranks have to call it; each of them makes a plan of
    its own, and none is left waiting where another one fails.

    Raises:
        WorkloadError: another rank's failure; this rank's own is raised as it is.
    """
    if not dist.is_available() or not dist.is_initialized():
        return make()
    failure: Exception | None = None
    try:
        outcome: tuple[bool, str] = (True, make().to_json())
    except Exception as error:
        failure = error
        outcome = (False, f"{type(error).__name__}: {error}")
    outcomes: list[tuple[bool, str]] = [outcome] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    if failure is not None:
        raise failure
    for rank, (made, text) in enumerate(outcomes):
        if not made:
            raise WorkloadError(f"rank {rank} found no plan ({text}): look at its own message")
    plans = [Plan.from_json(text) for _, text in outcomes]
    return min(plans, key=lambda plan: plan.ceiling_at_least)
