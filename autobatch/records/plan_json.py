"""A plan as JSON text, and back.

Invariant: what is read back equals what was written, and only what a tuner may write is read.
"""

from __future__ import annotations

from typing import TypeVar

from autobatch.records.codec import RecordError, decode, dump_json, encode, parse_versioned
from autobatch.records.plan_record import PlanRecord
from autobatch.records.soundness import check_sound

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
    document = parse_versioned(text, SCHEMA_VERSION, "the plan")
    answer = document.pop("answer", None)
    plan = decode(kind, document)
    check_sound(plan)
    if answer != _answer(plan):
        raise RecordError("its answer does not agree with its split")
    return plan
