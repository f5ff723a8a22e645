"""What all exports share: one micro-batch size, and arguments that the trainer knows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from autobatch.errors import UsageError
from autobatch.records.plan_record import PlanRecord
from autobatch.records.split import Split, uniform_alternatives

__all__ = ["checked", "one_size"]


def one_size(plan: PlanRecord, trainer: str, *, nearest: bool = False) -> Split:
    """Return the plan's split for a trainer whose micro-batches all have one size.

    Args:
        plan: may be ragged.
        trainer: its name, for the error.
        nearest: take the uniform split whose effective batch is nearest to the target, the smaller
            one of two equally near; otherwise a ragged plan is an error.

    Raises:
        UsageError: the plan is ragged; the message names the uniform splits below and above.
    """
    if plan.split.uniform:
        return plan.split
    offers = uniform_alternatives(plan.split, ceiling=plan.ceiling_at_least)
    closest = min(offers, key=lambda offer: abs(offer.target - plan.target))
    if nearest:
        return closest
    sizes = sorted({size for window in plan.split.windows for size in window}, reverse=True)
    others = " and ".join(map(_described, offers))
    raise UsageError(
        f"{trainer} takes micro-batches of one size, and an effective batch of {plan.target} needs "
        f"sizes {' and '.join(map(str, sizes))}: of one size there are {others}; pass nearest=True "
        f"for {closest.target}, or keep {plan.target} in your own loop with plan.windows"
    )


def _described(split: Split) -> str:
    ranks = f" × {split.world_size} GPUs" if split.world_size > 1 else ""
    return f"{split.micro_batch} × {split.accumulation_steps}{ranks} = {split.target}"


def checked(
    arguments: dict[str, Any], *, takes: Callable[..., Any], package: str
) -> dict[str, Any]:
    """Return the arguments after checking that the installed package's callable takes them all.

    Raises:
        UsageError: it does not take one of them; the message names the version.
    """
    known: Mapping[str, Any] = inspect.signature(takes).parameters
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise UsageError(
            f"{package} {version(package)} has no {', '.join(unknown)} in {takes.__name__}: "
            f"upgrade {package}, or set what it calls it by hand"
        )
    return arguments
