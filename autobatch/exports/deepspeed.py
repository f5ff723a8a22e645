"""A plan as a configuration for DeepSpeed: a dict, so DeepSpeed need not be installed.

Its keys are those of https://www.deepspeed.ai/docs/config-json/.
"""

from __future__ import annotations

from typing import Any

from autobatch.errors import UsageError
from autobatch.exports.by_hand import require_by_hand
from autobatch.exports.one_size import one_size
from autobatch.records.plan_record import PlanRecord

__all__ = ["configuration"]

_STAGES = {None: 0, "ddp": 0, "fsdp": 3}


def configuration(
    plan: PlanRecord, *, zero_stage: int | None = None, nearest: bool = False, by_hand: bool = False
) -> dict[str, Any]:
    """Return the part of a DeepSpeed configuration that the plan decides.

    See `Plan.to_deepspeed`.
    """
    split = one_size(plan, "DeepSpeed", nearest=nearest)
    require_by_hand(plan, "deepspeed", "DeepSpeed", by_hand=by_hand)
    autocast = plan.model.autocast
    return {
        "train_batch_size": split.effective_batch,
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": split.accumulation_steps,
        "gradient_clipping": plan.model.clip_norm or 0.0,
        "bf16": {"enabled": autocast == "bf16"},
        "fp16": {"enabled": autocast == "fp16"},
        "zero_optimization": {"stage": _stage(plan, zero_stage)},
    }


def _stage(plan: PlanRecord, zero_stage: int | None) -> int:
    if zero_stage is not None:
        if isinstance(zero_stage, bool) or zero_stage not in (0, 1, 2, 3):
            raise UsageError(f"zero_stage is {zero_stage!r}: DeepSpeed has stages 0, 1, 2 and 3")
        return zero_stage
    if plan.sharding not in _STAGES:
        raise UsageError(
            "the plan was made with a sharding function, and autobatch cannot tell which ZeRO "
            "stage is like it: pass zero_stage=3 where parameters are sharded, 2 where only "
            "gradients and optimizer state are"
        )
    return _STAGES[plan.sharding]
