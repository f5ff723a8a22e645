"""A plan's answer as environment variables and as YAML, for training scripts of your own."""

from __future__ import annotations

import json

from autobatch.exports.one_size import one_size
from autobatch.records.plan_record import PlanRecord

__all__ = ["environment", "yaml"]


def environment(plan: PlanRecord, *, nearest: bool = False) -> dict[str, str]:
    """Return the answer as environment variables; see `Plan.to_env`."""
    split = one_size(plan, "a set of environment variables", nearest=nearest)
    variables = {
        "AUTOBATCH_MICRO_BATCH": split.micro_batch,
        "AUTOBATCH_ACCUMULATION_STEPS": split.accumulation_steps,
        "AUTOBATCH_WORLD_SIZE": split.world_size,
        "AUTOBATCH_EFFECTIVE_BATCH": split.effective_batch,
        "AUTOBATCH_AUTOCAST": plan.model.autocast,
        "AUTOBATCH_CLIP_NORM": plan.model.clip_norm,
        "AUTOBATCH_LEVERS": "; ".join(lever.label for lever in plan.levers) or None,
    }
    return {name: str(value) for name, value in variables.items() if value is not None}


def yaml(plan: PlanRecord) -> str:
    """Return the answer as YAML; see `Plan.to_yaml`."""
    answer = {
        "micro_batch": plan.micro_batch,
        "accumulation_steps": plan.accumulation_steps,
        "world_size": plan.world_size,
        "effective_batch": plan.effective_batch,
        "ceiling": plan.ceiling,
        "autocast": plan.model.autocast,
        "clip_norm": plan.model.clip_norm,
        "sharding": plan.sharding,
        "gpu": plan.gpu.name,
        **({"levers": [lever.label for lever in plan.levers]} if plan.levers else {}),
        **({} if plan.split.uniform else {"windows": plan.split.windows}),
    }
    # YAML 1.2 reads JSON's scalars and lists as they are
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in answer.items())
