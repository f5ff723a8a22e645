"""A plan as arguments for transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from autobatch.exports.by_hand import require_by_hand
from autobatch.exports.one_size import checked, one_size
from autobatch.records.plan_record import PlanRecord

__all__ = ["RECOMPUTE", "TRAINER", "training_arguments"]

TRAINER = "transformers' Trainer"
_RECOMPUTES = ("activation_checkpointing", "gradient_checkpointing")  # the older name is second
RECOMPUTE = next(name for name in _RECOMPUTES if name in TrainingArguments.__dataclass_fields__)
"""The name of the argument, and of the model's methods, that recompute activations."""


def training_arguments(
    plan: PlanRecord, *, nearest: bool = False, by_hand: bool = False
) -> dict[str, Any]:
    """Return keyword arguments for TrainingArguments; see `Plan.to_training_arguments`."""
    split = one_size(plan, TRAINER, nearest=nearest)
    require_by_hand(plan, "transformers", TRAINER, by_hand=by_hand)
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": split.micro_batch,
        "gradient_accumulation_steps": split.accumulation_steps,
        "max_grad_norm": plan.model.clip_norm or 0.0,
        "bf16": plan.model.autocast == "bf16",
        "fp16": plan.model.autocast == "fp16",
        "average_tokens_across_devices": True,
    }
    if plan.model.optimizer == "AdamW":
        # every AdamW of torch makes the same update, and the fused one has no temporaries: it
        # never needs more memory than was planned
        arguments["optim"] = "adamw_torch_fused"
    for lever in plan.levers:
        arguments |= {_as_installed(name): value for name, value in lever.arguments.items()}
    return checked(arguments, takes=TrainingArguments, package="transformers")


def _as_installed(name: str) -> str:
    """Return how the installed version calls an argument: a plan may come from another machine."""
    for known in _RECOMPUTES:
        if name.startswith(known):
            return RECOMPUTE + name.removeprefix(known)
    return name
