"""Tuning for trainers whose micro-batches all have one size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from autobatch.exports.one_size import one_size
from autobatch.plan.plan import Plan

__all__ = ["tuned_to_one_size"]


def tuned_to_one_size(
    make: Callable[[int], Plan], target: int, trainer: str, *, nearest: bool
) -> Plan:
    """Return the plan that `make` finds for a target, made again for the nearest one where asked.

    Raises:
        UsageError: the plan is ragged and `nearest` is not set.
    """
    plan = make(target)
    split = one_size(plan, trainer, nearest=nearest)
    if split == plan.split:
        return plan
    plan = make(split.target)
    one_size(plan, trainer)
    note = (
        f"an effective batch of {split.target} in place of the {target} asked for, which needs "
        "micro-batches of several sizes (nearest=True)"
    )
    return replace(plan, notes=(*plan.notes, note))
