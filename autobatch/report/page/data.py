"""What the scripts of a plan's page know: the plan's own figures, as JSON in the page.

Invariant: every figure is the plan's; names are listed once and referred to by their place.
"""

from __future__ import annotations

from typing import Any

from autobatch.gpus.uncertainty import CONTEXTS, HIGH, LOW, NEEDED, nccl_bytes
from autobatch.records.holders import Holder
from autobatch.records.plan_record import PlanRecord
from autobatch.report.document import printable
from autobatch.report.holders import tensor_text

__all__ = ["page_data"]


def page_data(plan: PlanRecord) -> dict[str, Any]:
    """Return what the page's scripts read."""
    return {
        "plan": _answer(plan),
        "timeline": _timeline(plan),
        "lives": _lives(plan),
        "peak": _peak(plan),
        "curve": [
            [point.micro_batch, point.peak_reserved_bytes, point.evidence] for point in plan.curve
        ],
        "whatIf": _what_if(plan),
    }


def _answer(plan: PlanRecord) -> dict[str, Any]:
    return {
        "target": plan.target,
        "worldSize": plan.world_size,
        "microBatch": plan.micro_batch,
        "steps": plan.accumulation_steps,
        "ceiling": plan.ceiling_at_least,
        "headroom": plan.headroom,
        "budget": plan.budget_bytes,
        "context": plan.footprint.context_bytes,
        "others": plan.others_bytes,
        "capacity": plan.gpu.capacity_bytes,
        "gpu": printable(plan.gpu.name),
        "peakAllocated": plan.footprint.peak_allocated_bytes,
        "peakReserved": plan.footprint.peak_reserved_bytes,
    }


class _Names:
    """Names, each once, in the order in which they came."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def place(self, name: str) -> int:
        return self._places.setdefault(printable(name), len(self._places))

    def all(self) -> list[str]:
        return list(self._places)


def _timeline(plan: PlanRecord) -> dict[str, Any] | None:
    timeline = plan.timeline
    if not timeline.samples:
        return None
    names = [
        name
        for name in plan.footprint.categories
        if any(sample.categories.get(name) for sample in timeline.samples)
    ]
    return {
        "events": [sample.event for sample in timeline.samples],
        "categories": names,
        "bytes": [
            [sample.categories.get(name, 0) for sample in timeline.samples] for name in names
        ],
        "allocated": [sample.allocated_bytes for sample in timeline.samples],
        "reserved": [sample.reserved_bytes for sample in timeline.samples],
        "marks": [
            [event, printable(phase), window, micro_batch]
            for event, phase, window, micro_batch in timeline.marks
        ],
        "peak": timeline.peak_event,
    }


def _lives(plan: PlanRecord) -> dict[str, Any] | None:
    lives = plan.lives
    if lives is None:
        return None
    modules, ops, tensors, wheres = _Names(), _Names(), _Names(), _Names()
    categories = list(plan.footprint.categories)
    return {
        "holders": [
            [
                modules.place(holder.module),
                ops.place(holder.op),
                _category(categories, holder),
                tensors.place(tensor_text(holder)),
                wheres.place(holder.where),
            ]
            for holder in lives.holders
        ],
        "categories": categories,
        "modules": modules.all(),
        "ops": ops.all(),
        "tensors": tensors.all(),
        "wheres": wheres.all(),
        "holder": list(lives.holder),
        "start": list(lives.start),
        "end": list(lives.end),
        "size": list(lives.size_bytes),
        "least": lives.least_bytes,
        "events": lives.events,
    }


def _category(categories: list[str], holder: Holder) -> int:
    name = holder.category
    return categories.index(name if name in categories else "other")


def _peak(plan: PlanRecord) -> list[list[Any]]:
    """Return modules, categories, operators and bytes at the peak; of all blocks."""
    categories = list(plan.footprint.categories)
    sums: dict[tuple[str, int, str], int] = {}
    for blocks in plan.peak_blocks:
        holder = blocks.holder
        key = printable(holder.module), _category(categories, holder), printable(holder.op)
        sums[key] = sums.get(key, 0) + blocks.size_bytes
    return [[*key, size] for key, size in sums.items()]


def _what_if(plan: PlanRecord) -> dict[str, Any] | None:
    known = plan.what_if
    if known is None:
        return None
    needed = NEEDED[plan.footprint.kind or "convolutions"]
    return {
        "sizes": list(known.micro_batches),
        "peaks": list(known.peak_reserved_bytes),
        "cards": [
            {
                "name": printable(card.name),
                "capacity": card.capacity_bytes,
                "context": card.context_bytes,
                "headrooms": list(card.headrooms),
                "ceilings": list(card.ceilings),
            }
            for card in known.cards
        ],
        "needed": [list(needed), list(needed.values())],
        "between": [LOW, HIGH],
        "contexts": CONTEXTS[1],
        "nccl": nccl_bytes(plan.world_size),
    }
