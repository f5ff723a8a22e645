"""A plan as arguments for Lightning's Trainer."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from autobatch.errors import UsageError
from autobatch.exports.by_hand import BF16_WEIGHTS, require_by_hand
from autobatch.exports.one_size import checked, one_size
from autobatch.records.plan_record import PlanRecord

__all__ = ["PRECISIONS", "TRAINER", "LightningSettings", "settings", "whole_windows"]

TRAINER = "Lightning's Trainer"
PRECISIONS = {None: "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
"""Lightning's name for each precision of autocast."""


class LightningSettings(NamedTuple):
    """What a plan means for Lightning.

    Attributes:
        trainer: keyword arguments for `lightning.Trainer`.
        dataloader: keyword arguments for each process's `DataLoader` of the training set.
    """

    trainer: dict[str, Any]
    dataloader: dict[str, Any]


def settings(
    plan: PlanRecord, *, samples: int | None = None, nearest: bool = False, by_hand: bool = False
) -> LightningSettings:
    """Return the plan as arguments for Lightning; see `Plan.to_lightning`."""
    split = one_size(plan, TRAINER, nearest=nearest)
    require_by_hand(plan, "lightning", TRAINER, by_hand=by_hand)
    arguments: dict[str, Any] = {
        "accumulate_grad_batches": split.accumulation_steps,
        "gradient_clip_val": plan.model.clip_norm,
        "precision": _precision(plan),
        "devices": split.world_size,
    }
    if plan.model.clip_norm is not None:
        arguments["gradient_clip_algorithm"] = "norm"
    if plan.sharding == "ddp":
        arguments["strategy"] = "ddp"
    if samples is not None:
        arguments["limit_train_batches"] = whole_windows(split.target, samples) * (
            split.accumulation_steps
        )
    return LightningSettings(
        trainer=checked(arguments, takes=Trainer, package="lightning"),
        dataloader={"batch_size": split.micro_batch, "drop_last": True},
    )


def _precision(plan: PlanRecord) -> str:
    if any(lever.label == BF16_WEIGHTS for lever in plan.levers):
        return "bf16-true"
    return PRECISIONS[plan.model.autocast]


def whole_windows(target: int, samples: int) -> int:
    """Return how many whole windows so many samples fill.

    Raises:
        UsageError: they do not fill one.
    """
    if samples < target:
        raise UsageError(
            f"{samples} samples do not fill one effective batch of {target}: use a smaller target, "
            "or a training set of at least as many"
        )
    return samples // target
