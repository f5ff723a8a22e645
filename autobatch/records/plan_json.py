"""A plan as JSON text, and back.

Invariant: what is read back equals what was written, and only what a tuner may write is read.
"""

from __future__ import annotations

from typing import TypeVar

from autobatch.records.codec import RecordError, decode, dump_json, encode, parse_json
from autobatch.records.plan_record import PlanRecord

__all__ = ["SCHEMA_VERSION", "read_plan", "write_plan"]

SCHEMA_VERSION = 1

P = TypeVar("P", bound=PlanRecord)


def write_plan(plan: PlanRecord) -> str:
    """Render a plan as JSON text, the answer first.

    Raises:
        RecordError: a number is not finite.
    """
    header = {"schema_version": SCHEMA_VERSION, "answer": _answer(plan)}
    return dump_json(header | encode(plan))


def _answer(plan: PlanRecord) -> dict[str, int | None]:
    """What readers of the JSON want first; derived, and checked when a plan is loaded."""
    return {
        "micro_batch": plan.micro_batch,
        "accumulation_steps": plan.accumulation_steps,
        "world_size": plan.world_size,
        "effective_batch": plan.effective_batch,
        "ceiling": plan.ceiling,
    }


def read_plan(kind: type[P], text: str) -> P:
    """Rebuild a plan of type `kind` from the text that `write_plan` rendered.

    Raises:
        RecordError: the text is no sound plan of this schema.
    """
    document = parse_json(text)
    if not isinstance(document, dict):
        raise RecordError("it does not hold a JSON object")
    version = document.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"its schema_version is {str(version)[:20]!r}, and this autobatch reads "
            f"{SCHEMA_VERSION}; make the plan again, or use the autobatch that wrote it"
        )
    answer = document.pop("answer", None)
    plan = decode(kind, document)
    _check_sound(plan)
    if answer != _answer(plan):
        raise RecordError("its answer does not agree with its split")
    return plan


def _check_sound(plan: PlanRecord) -> None:
    """Raise a RecordError for figures that no tuner writes and no report can render."""
    windows = plan.split.windows
    footprints = (plan.footprint, plan.ceiling_footprint)
    rules = {
        "split.windows must hold sizes of at least 1, as many for each rank": (
            bool(windows)
            and len({len(window) for window in windows}) == 1
            and all(window and min(window) >= 1 for window in windows)
        ),
        "split.windows must sum to split.target": sum(map(sum, windows)) == plan.target,
        "gpu.capacity_bytes and budget_bytes must be positive": (
            plan.gpu.capacity_bytes > 0 and plan.budget_bytes > 0
        ),
        "headroom must be at least 0 and below 1": 0 <= plan.headroom < 1,
        "model.autocast must be bf16, fp16 or null": plan.model.autocast in (None, "bf16", "fp16"),
        "every ceiling must be at least 1": plan.ceiling_at_least >= 1
        and (plan.ceiling is None or plan.ceiling >= 1),
        "every micro_batch must be at least 1": (
            all(footprint.micro_batch >= 1 for footprint in footprints)
            and all(trial.micro_batch >= 1 for trial in plan.trials)
            and all(point.micro_batch >= 1 for point in plan.curve)
        ),
        "every footprint's categories must sum to its peak_allocated_bytes, above 0": all(
            sum(footprint.categories.values()) == footprint.peak_allocated_bytes > 0
            for footprint in footprints
        ),
    }
    if plan.otherwise is not None:
        parts = plan.otherwise.categories
        rules["otherwise's categories must sum to its peak_allocated_bytes, above 0"] = (
            set(parts) == set(plan.footprint.categories)
            and sum(parts.values()) == plan.otherwise.peak_allocated_bytes > 0
        )
    for rule, holds in rules.items():
        if not holds:
            raise RecordError(rule)
