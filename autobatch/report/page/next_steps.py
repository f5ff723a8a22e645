"""The lines that bring a plan into training, for each way to train.

Invariant: the lines hold for this plan as it is; nothing of a trainer is imported to write them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autobatch.advice.loop import training_loop
from autobatch.records.plan_record import PlanRecord
from autobatch.support.templates import render

__all__ = ["Step", "next_steps"]

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A way to train with a plan.

    Attributes:
        name: what the tab is called; key: the same as part of an id.
        code: to copy.
        about: what the lines expect and do, in one or two sentences.
    """

    key: str
    name: str
    about: str
    code: str


def next_steps(plan: PlanRecord) -> tuple[Step, ...]:
    """Return the ways to train with a plan, the plainest first."""
    values = {
        "ranks": plan.world_size,
        "steps": plan.accumulation_steps,
        "size": plan.micro_batch,
        "target": plan.effective_batch,
        "uniform": plan.split.uniform,
        "clip_norm": plan.model.clip_norm,
        "autocast": {"bf16": "torch.bfloat16", "fp16": "torch.float16"}.get(
            plan.model.autocast or ""
        ),
        "precision": plan.model.autocast,
        "sharded": plan.is_sharded,
    }

    def written(key: str) -> str:
        return render(_TEMPLATES, f"{key}.py.jinja", **values).strip("\n") + "\n"

    nearest = (
        ""
        if plan.split.uniform
        else " Trainers take micro-batches of one size, so the nearest effective batch is taken."
    )
    return (
        Step(
            key="windows",
            name="Your loop",
            about=(
                "`plan.windows` makes the plan's micro-batches of any loader and steps with the "
                "gradient of the whole effective batch. It expects your `model`, `optimizer`, "
                "`loader` and a `loss_fn(model, batch)` that is a mean over samples."
            ),
            code=written("windows"),
        ),
        Step(
            key="plain",
            name="Plain PyTorch",
            about=(
                "Without autobatch in the training. It expects your `model`, `optimizer`, "
                "`dataset`, `epochs` and, unless the model gives its loss, a "
                "`loss_fn(model, batch)` that is a mean over samples. An incomplete last window of "
                "an epoch is left out."
            ),
            code=training_loop(plan),
        ),
        Step(
            key="transformers",
            name="Trainer",
            about=(
                "Hugging Face's Trainer with this plan's sizes; the callback keeps the plan in "
                "each checkpoint and tries whether the loss may be accumulated." + nearest
            ),
            code=written("transformers"),
        ),
        Step(
            key="lightning",
            name="Lightning",
            about=(
                "`MeanOverWindow` makes the last, partial window of an epoch weigh its samples "
                "as all others do." + nearest
            ),
            code=written("lightning"),
        ),
        Step(
            key="accelerate",
            name="Accelerate",
            about="Every update has exactly the target, over ends of epochs, too." + nearest,
            code=written("accelerate"),
        ),
        Step(
            key="torchrun",
            name="torchrun",
            about=(
                "A `train.py` for the plan's GPUs, and in its first line how it is started."
                if plan.world_size > 1
                else "This plan is for one GPU. With `world_size=` a plan is made for several, "
                "and this is how one is run."
            ),
            code=written("torchrun"),
        ),
    )
