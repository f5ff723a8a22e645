"""A plan in Accelerate's words; the only module that imports accelerate."""

from __future__ import annotations

from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, convert_outputs_to_fp32
from torch import nn

from autobatch.exports.one_size import checked, one_size
from autobatch.plan.plan import Plan

__all__ = ["AccelerateSettings", "return_fp32", "settings"]


class AccelerateSettings(NamedTuple):
    """What a plan means for Accelerate.

    Attributes:
        accelerator: keyword arguments for `accelerate.Accelerator`.
        dataloader: keyword arguments for the training set's `DataLoader`, one process's share.
    """

    accelerator: dict[str, Any]
    dataloader: dict[str, Any]


def settings(plan: Plan, *, nearest: bool = False) -> AccelerateSettings:
    """Return the plan in Accelerate's words; see `Plan.to_accelerate`."""
    split = one_size(plan, "Accelerate", nearest=nearest)
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


def return_fp32(model: nn.Module) -> None:
    """Let a model return fp32 in place of half precision, as `Accelerator.prepare` does in place.

    The copy that this makes of the output is memory that a run under autocast needs.
    """
    if "forward" not in vars(model):
        model.forward = convert_outputs_to_fp32(model.forward)
