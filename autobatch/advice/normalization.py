"""What accumulation does to layers that normalise over the batch."""

from __future__ import annotations

from dataclasses import dataclass

from autobatch.advice.accumulation import samples_per_update
from autobatch.records.plan_record import PlanRecord
from autobatch.support.wording import count

__all__ = ["BatchNormRow", "batchnorm", "batchnorm_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchNormRow:
    """One thing that accumulation changes in BatchNorm, on one GPU.

    `before` is with all samples of an update at once, `after` as planned; where micro-batches have
    two sizes, it is the smaller and the larger.
    """

    what: str
    before: int
    after: tuple[int, ...]


def batchnorm_rows(plan: PlanRecord) -> tuple[BatchNormRow, ...]:
    """Compare what BatchNorm sees with and without accumulation; nothing where there is none."""
    if not plan.model.batchnorm_layers:
        return ()
    return (
        BatchNormRow(
            what="samples in each layer's statistics",
            before=samples_per_update(plan),
            after=tuple(sorted({size for window in plan.split.windows for size in window})),
        ),
        BatchNormRow(
            what="times the running averages move per update",
            before=1,
            after=(plan.accumulation_steps,),
        ),
    )


def batchnorm(plan: PlanRecord) -> str:
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
