"""The training loop of a plan, as Python to paste; templates/loop.py.jinja holds its lines."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from autobatch.advice.levers import in_force, lever_code, steps_in_backward
from autobatch.records.plan_record import PlanRecord
from autobatch.support.templates import render

__all__ = ["training_loop"]

_TEMPLATES = Path(__file__).parent / "templates"
_AUTOCAST = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}
_LOSSES_OF_EARLIER_PLANS = {
    "output.loss": "model(**batch).loss",
    "mean of output.loss": "model(**batch).loss.mean()",
    "scalar output": "model(batch)",
}


def training_loop(plan: PlanRecord) -> str:
    """Write the training loop of the plan as Python to paste, in plain PyTorch.

    The code of the plan's levers comes first. The loop expects `model`, `optimizer`, `dataset`,
    `epochs` and, where the loss is the user's own, `loss_fn(model, batch)` returning a mean over
    samples. The gradient of each window equals that of its effective batch, for uniform and ragged
    windows, on one GPU, under DistributedDataParallel or FSDP2. An incomplete last window of an
    epoch is left out.
    """
    ranks, steps = plan.world_size, plan.accumulation_steps
    levers = lever_code(plan.levers, imported=("import torch",))
    loop = render(
        _TEMPLATES,
        "loop.py.jinja",
        ranks=ranks,
        steps=steps,
        sharded=plan.is_sharded,
        uniform=plan.split.uniform,
        target=plan.effective_batch,
        windows=plan.split.windows,
        sizes=list(chain.from_iterable(plan.split.windows)),
        delays_reduction=ranks > 1 and steps > 1 and not plan.is_sharded,
        loss=plan.model.loss_code or _of_earlier(plan),
        weight=_weight(plan),
        dtype=_AUTOCAST.get(plan.model.autocast or ""),
        scaled=plan.model.autocast == "fp16",
        clip_norm=plan.model.clip_norm,
        levers=levers,
        steps_in_backward=steps_in_backward(plan.levers),
    )
    return in_force(loop, levers.around)


def _of_earlier(plan: PlanRecord) -> str:
    """Return the loss of a plan that does not say how it was computed."""
    return _LOSSES_OF_EARLIER_PLANS.get(plan.model.loss, "loss_fn(model, batch)")


def _weight(plan: PlanRecord) -> str:
    """Return the factor on each loss that makes their sum over a window the mean over samples."""
    if plan.split.uniform:
        return " / steps" if plan.accumulation_steps > 1 else ""
    ranks = f" * {plan.world_size}" if plan.world_size > 1 else ""
    return f" * size{ranks} / {plan.effective_batch}"
