"""Plain words for windows and the effective batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from autobatch.records.plan_record import PlanRecord
from autobatch.support.wording import count

__all__ = ["effective_batch", "window_text"]


def window_text(window: Sequence[int]) -> str:
    """Write the micro-batches of one rank's window, repeated sizes once.

    >>> window_text((86, 85, 85)), window_text((64, 64, 64, 64))
    ('86 + 2 × 85', '4 × 64')
    """
    runs = [(size, len(list(group))) for size, group in groupby(window)]
    return " + ".join(
        f"{length} × {size:,}" if length > 1 else f"{size:,}" for size, length in runs
    )


def effective_batch(plan: PlanRecord) -> str:
    """Say how micro-batch, accumulation steps and GPUs make the effective batch."""
    steps = count(plan.accumulation_steps, "accumulation step")
    gpus = count(plan.world_size, "GPU")
    if plan.split.uniform:
        return (
            f"micro-batch {plan.micro_batch:,} × {steps} × {gpus} "
            f"= effective batch {plan.effective_batch:,}"
        )
    smallest = min(map(min, plan.split.windows))
    return (
        f"micro-batches of {plan.micro_batch:,} and {smallest:,} over {steps} × {gpus} "
        f"= effective batch {plan.effective_batch:,}"
    )
