"""The lines that bring a plan into training, for each way to train.

Invariant: the lines hold for this plan as it is; nothing of a trainer is imported to write them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from autobatch.advice.levers import in_force, lever_code, steps_in_backward
from autobatch.advice.loop import training_loop
from autobatch.exports.by_hand import Trainer, levers_by_hand
from autobatch.records.applied import AppliedLever
from autobatch.records.plan_record import PlanRecord
from autobatch.support.templates import render

__all__ = ["Step", "next_steps"]

_TEMPLATES = Path(__file__).parent / "templates"


_IMPORTED = {
    "windows": (),
    "transformers": (),
    "lightning": (),
    "accelerate": (),
    "torchrun": ("import os", "import torch"),
}
"""Lines of imports that each script has whatever the plan is."""


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


def _for_trainer(lever: AppliedLever) -> AppliedLever:
    """Return a lever as a trainer's script has it: trainers share a model out by themselves."""
    if lever.lever != "sharding":
        return lever
    return replace(lever, code="# set this in the configuration of what starts the training")


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

    def written(key: str, trainer: Trainer | None = None) -> str:
        levers = plan.levers
        if trainer is not None:
            levers = tuple(map(_for_trainer, levers_by_hand(plan, trainer)))
        options = [
            *(() if plan.split.uniform else ("nearest=True",)),
            *(("by_hand=True",) if trainer and levers else ()),
        ]
        code = lever_code(levers, imported=_IMPORTED[key])
        script = render(
            _TEMPLATES, f"{key}.py.jinja", **values, levers=code, options=", ".join(options)
        )
        return in_force(script.strip("\n"), code.around) + "\n"

    plain = training_loop(plan)
    but = ", but for what its levers import" if "from autobatch" in plain else ""
    nearest = (
        ""
        if plan.split.uniform
        else " Trainers take micro-batches of one size, so the nearest effective batch is taken."
    )
    steps = (
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
                f"Without autobatch in the training{but}. It expects your `model`, `optimizer`, "
                "`dataset`, `epochs` and, unless the model gives its loss, a "
                "`loss_fn(model, batch)` that is a mean over samples. An incomplete last window of "
                "an epoch is left out."
            ),
            code=plain,
        ),
        Step(
            key="transformers",
            name="Trainer",
            about=(
                "Hugging Face's Trainer with this plan's sizes; the callback keeps the plan in "
                "each checkpoint and tries whether the loss may be accumulated." + nearest
            ),
            code=written("transformers", "transformers"),
        ),
        Step(
            key="lightning",
            name="Lightning",
            about=(
                "`MeanOverWindow` makes the last, partial window of an epoch weigh its samples "
                "as all others do." + nearest
            ),
            code=written("lightning", "lightning"),
        ),
        Step(
            key="accelerate",
            name="Accelerate",
            about="Every update has exactly the target, over ends of epochs, too." + nearest,
            code=written("accelerate", "accelerate"),
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
    if steps_in_backward(plan.levers):  # no trainer and no window lets hooks step
        return tuple(step for step in steps if step.key == "plain")
    return steps
