"""Which levers of a plan a trainer's settings cannot set, and who then applies them.

Invariant: no export leaves a lever out unless its caller says that the model has it.
"""

from __future__ import annotations

from typing import Literal

from autobatch.errors import UsageError
from autobatch.records.applied import AppliedLever
from autobatch.records.plan_record import PlanRecord

__all__ = ["BF16_WEIGHTS", "Trainer", "levers_by_hand", "require_by_hand"]

Trainer = Literal["transformers", "lightning", "accelerate", "deepspeed"]

BF16_WEIGHTS = "precision: bf16 weights"
"""The lever whose weights, gradients and optimizer state are in bfloat16."""

_BY_THE_PLAN = frozenset(
    ("precision: bf16 autocast", "precision: fp16 autocast", "precision: fp32", "sharding: DDP")
)
"""What a plan says by itself, and every trainer is told or does without being told."""

_SET: dict[Trainer, frozenset[str]] = {
    "transformers": frozenset(),  # beside what the levers themselves name
    "lightning": frozenset((BF16_WEIGHTS,)),
    "accelerate": frozenset(),
    "deepspeed": frozenset(("sharding: FSDP2",)),
}


def levers_by_hand(plan: PlanRecord, trainer: Trainer) -> tuple[AppliedLever, ...]:
    """Return the levers of a plan that the settings of a trainer do not set."""
    return tuple(
        lever
        for lever in plan.levers
        if lever.label not in _BY_THE_PLAN | _SET[trainer]
        and not (trainer == "transformers" and lever.arguments)
    )


def require_by_hand(plan: PlanRecord, trainer: Trainer, name: str, *, by_hand: bool) -> None:
    """Refuse levers that a trainer's settings do not set, unless they are set otherwise.

    Args:
        plan: may have levers.
        trainer: whose settings are made.
        name: what the error calls it.
        by_hand: whether the caller's own code applies them.

    Raises:
        UsageError: there are such levers; the message names them.
    """
    levers = levers_by_hand(plan, trainer)
    if levers and not by_hand:
        labels = "; ".join(lever.label for lever in levers)
        raise UsageError(
            f"the plan was made with {labels}, which no setting of {name} does: apply the code "
            "that the plan's report shows to your model, and pass by_hand=True"
        )
