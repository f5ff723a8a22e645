"""A plan as settings for Accelerate."""

from __future__ import annotations

from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from autobatch.exports.by_hand import require_by_hand
from autobatch.exports.one_size import checked, one_size
from autobatch.records.plan_record import PlanRecord

__all__ = ["AccelerateSettings", "settings"]


class AccelerateSettings(NamedTuple):
    """What a plan means for Accelerate.

    Attributes:
        accelerator: keyword arguments for `accelerate.Accelerator`.
        dataloader: keyword arguments for each process's `DataLoader` of the training set.
    """

    accelerator: dict[str, Any]
    dataloader: dict[str, Any]


def settings(
    plan: PlanRecord, *, nearest: bool = False, by_hand: bool = False
) -> AccelerateSettings:
    """Return the plan as settings for Accelerate; see `Plan.to_accelerate`."""
    split = one_size(plan, "Accelerate", nearest=nearest)
    require_by_hand(plan, "accelerate", "Accelerate", by_hand=by_hand)
    arguments = {
        "gradient_accumulation_plugin": GradientAccumulationPlugin(
            num_steps=split.accumulation_steps, sync_with_dataloader=False
        ),
        "mixed_precision": plan.model.autocast or "no",
    }
    return AccelerateSettings(
        accelerator=checked(arguments, takes=Accelerator, package="accelerate"),
        dataloader={"batch_size": split.micro_batch, "drop_last": True},
    )
