"""What accumulation does to layers that normalise over the batch."""

from __future__ import annotations

from autobatch.advice.wording import count
from autobatch.plan import Plan

__all__ = ["batchnorm"]


def batchnorm(plan: Plan) -> str:
    """Say whether the model has BatchNorm and what accumulation means for it."""
    layers = plan.model.batchnorm_layers
    if layers == 0:
        return (
            "The model has no BatchNorm layers: no statistics depend on the micro-batch, so its "
            "size changes memory and speed, not the result."
        )
    seen = (
        f"The model has {count(layers, 'BatchNorm layer')}. In training they normalise with the "
        f"statistics of one micro-batch of {plan.micro_batch:,}"
    )
    if plan.accumulation_steps == 1 and plan.world_size == 1:
        return f"{seen}, which is the whole effective batch here."
    advice = [
        f"{seen}, not of the effective batch of {plan.effective_batch:,}, and move their running "
        f"averages {count(plan.accumulation_steps, 'time')} per optimizer update.",
        "The result is therefore not identical to training without accumulation.",
    ]
    if plan.micro_batch < 16:
        advice.append(
            "Statistics of fewer than 16 samples are noisy and cost accuracy "
            "(Wu and He 2018, Group Normalization, https://arxiv.org/abs/1803.08494)."
        )
    if plan.ceiling_at_least > plan.micro_batch:
        advice.append(
            f"A larger micro-batch helps: up to {plan.ceiling_at_least:,} fits on this GPU."
        )
    if plan.world_size > 1:
        advice.append(
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) shares the statistics between "
            "GPUs, but not between accumulation steps."
        )
    advice.append(
        "Where it matters, use GroupNorm or LayerNorm, or freeze the statistics by putting these "
        "layers into evaluation mode."
    )
    return " ".join(advice)
