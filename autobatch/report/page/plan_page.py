"""Puts the page of a plan together: what it says, what it draws, what its scripts know.

Invariant: every string of the plan is escaped, in the markup and in the data; the only script that
the page's policy lets run is our own.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autobatch.advice.wording import effective_batch
from autobatch.records.plan_record import PlanRecord
from autobatch.report.content import (
    evidence_section,
    plan_facts,
    speed_sections,
    training_sections,
    why_this_size,
)
from autobatch.report.document import Bullets, Table, printable
from autobatch.report.footprint_summary import account, device_range
from autobatch.report.holders import holder_sections
from autobatch.report.page import figures
from autobatch.report.page.data import page_data
from autobatch.report.page.next_steps import next_steps
from autobatch.report.page.other_cards import other_cards
from autobatch.report.savings import savings_section
from autobatch.support.units import format_bytes

__all__ = ["Number", "css_class", "plan_values"]

_CLASSES = {
    "optimizer state": "c-optimizer",
    "other processes": "c-processes",
    "rounding by the allocator": "c-rounding",
    "cached by the allocator": "c-cached",
    "CUDA context": "c-context",
    **{
        name: f"c-{name}"
        for name in (
            "parameters buffers gradients activations temporaries inputs workspace other rounding "
            "cached context"
        ).split()
    },
    **{phase: phase for phase in ("setup", "forward", "backward", "step", "evaluate")},
}
"""Classes of the style sheet by the name of what they colour; no string of a plan becomes one."""

_SURE = 0.9
"""How likely a plan has to be to fit, for its page to say without reserve that it does."""


_WHAT_IF = "What if"

_SHORT = defaultdict(str, forward="fwd", backward="bwd", step="step")
"""Names of phases where there is little room; none of a phase that can do without."""

_VISIBLE = 0.004
"""The share of the peak from which on a category has a colour that can be seen."""


class Number(NamedTuple):
    """A number of the answer, and what it counts."""

    number: str
    label: str


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the account of the device."""

    name: str
    size_bytes: str
    size: str
    most: str
    share: str
    is_total: bool


def css_class(name: str) -> str:
    """Return the class that colours a category or a phase; none for what is not known."""
    return _CLASSES.get(name, "")


def plan_values(plan: PlanRecord) -> dict[str, object]:
    """Return what the template of a plan's page is rendered with."""
    footprint = plan.footprint
    timeline, curve = figures.timeline(plan), figures.curve(plan)
    blocks, *holders = holder_sections(plan) or (None,)
    verdict, is_sure = _verdict(plan)
    peak = format_bytes(footprint.peak_reserved_bytes)
    others = other_cards(plan)
    values: dict[str, object] = {
        "title": effective_batch(plan),
        "who": f"{printable(plan.model.name)} on {printable(plan.gpu.name)}",
        "answer": _numbers(plan),
        "verdict": verdict,
        "verdict_text": _verdict_text(plan),
        "is_sure": is_sure,
        "facts": plan_facts(plan),
        "bar": figures.bar(plan),
        "bar_label": (
            f"On the device at the peak: {format_bytes(footprint.peak_device_bytes)} of "
            f"{format_bytes(plan.gpu.capacity_bytes)}"
        ),
        "capacity": format_bytes(plan.gpu.capacity_bytes),
        "budget": format_bytes(plan.budget_bytes),
        "budget_end": format_bytes(footprint.context_bytes + plan.others_bytes + plan.budget_bytes),
        "range_text": device_range(footprint),
        "warnings": _bullets(plan.warnings),
        "notes": _bullets(plan.notes),
        "steps": next_steps(plan),
        "command": printable(plan.command or ""),
        "account": _account(plan),
        "has_most": bool(plan.most_bytes),
        "timeline": timeline,
        "timeline_names": _visible(plan),
        "short_names": _SHORT,
        "timeline_label": (
            f"Live bytes by category over the traced windows; the peak is "
            f"{format_bytes(footprint.peak_allocated_bytes)} allocated"
        ),
        "peak_allocated": format_bytes(footprint.peak_allocated_bytes),
        "has_icicle": bool(plan.peak_blocks),
        "blocks_section": blocks,
        "savings": savings_section(plan),
        "holders": holders,
        "curve": curve,
        "curve_label": (
            f"Reserved memory against the micro-batch; {peak} at the planned micro-batch of "
            f"{plan.micro_batch:,}, the budget is {format_bytes(plan.budget_bytes)}"
        ),
        "why": why_this_size(plan),
        "what_if": plan.what_if is not None,
        "what_if_title": _WHAT_IF if plan.what_if is not None else "Why this micro-batch",
        "why_no_what_if": _why_no_what_if(plan),
        "other_cards": printable(others.line),
        "other_cards_text": printable(others.text),
        "training": (*speed_sections(plan), *training_sections(plan)),
        "evidence": evidence_section(plan),
        "css_class": css_class,
        "data": _safe_json(page_data(plan)),
    }
    return values | {"contents": _contents(values)}


def _visible(plan: PlanRecord) -> list[str]:
    """Return the categories that can be seen in the timeline."""
    samples = plan.timeline.samples
    least = _VISIBLE * max((sample.allocated_bytes for sample in samples), default=0)
    return [
        name
        for name in plan.footprint.categories
        if any(sample.categories.get(name, 0) > least for sample in samples)
    ]


def _numbers(plan: PlanRecord) -> tuple[Number, ...]:
    sizes = sorted({size for window in plan.split.windows for size in window}, reverse=True)
    steps, ranks = plan.accumulation_steps, plan.world_size
    return (
        Number(" or ".join(f"{size:,}" for size in sizes), "micro-batch"),
        Number(f"{steps:,}", "accumulation step" if steps == 1 else "accumulation steps"),
        Number(f"{ranks:,}", "GPU" if ranks == 1 else "GPUs"),
        Number(f"{plan.effective_batch:,}", "effective batch"),
    )


def _verdict(plan: PlanRecord) -> tuple[str, bool]:
    """Say whether the plan fits, and whether that is as good as sure."""
    if plan.likelihood is None:
        return "Fits, as run on the card", True
    sure = plan.likelihood >= _SURE
    return f"{'Fits' if sure else 'May not fit'}: {plan.likelihood:.0%} likely", sure


def _verdict_text(plan: PlanRecord) -> str:
    footprint = plan.footprint
    ceiling = (
        f"the largest micro-batch that fits is {plan.ceiling:,}"
        if plan.ceiling is not None
        else f"micro-batch {plan.ceiling_at_least:,} fits, and larger ones may"
    )
    return (
        f"{format_bytes(footprint.peak_reserved_bytes)} reserved at the peak of a budget of "
        f"{format_bytes(plan.budget_bytes)}; {ceiling}."
    )


def _why_no_what_if(plan: PlanRecord) -> str:
    """Say why there are no sliders; nothing where there are some."""
    if plan.what_if is not None:
        return ""
    if plan.ceiling is None:
        why = (
            f"the search stopped at micro-batch {plan.ceiling_at_least:,} without an end, so that "
            "the ceilings of other questions are not known either"
        )
    elif plan.likelihood is None:
        why = "what was measured on one card does not tell for certain what another run would find"
    else:
        why = (
            "what was run here does not tell for certain which ceiling a search would find with "
            "another headroom or on another card"
        )
    return f"There are no sliders here: {why}."


def _account(plan: PlanRecord) -> tuple[_Row, ...]:
    """Return the rows of the account that all reports have, with their names apart."""
    (table,) = account(plan.footprint, plan.most_bytes).blocks
    assert isinstance(table, Table)
    return tuple(
        _Row(
            name=row[0],
            size_bytes=row[1],
            size=row[2],
            most=row[3] if len(row) > 4 else "",
            share=row[-1],
            is_total=index in table.totals,
        )
        for index, row in enumerate(table.rows)
    )


def _contents(values: dict[str, object]) -> Sequence[tuple[str, str]]:
    """Return the sections that the page has, by id."""
    sections = (
        ("next", "Use it", True),
        ("memory", "Where every byte goes", True),
        ("timeline", "Timeline", values["timeline"]),
        ("blocks", "Largest blocks", values["blocks_section"]),
        ("savings", "What could go", values["savings"]),
        ("what-if", values["what_if_title"], True),
        ("training", "What it means for training", True),
        ("evidence", "Evidence and notes", True),
    )
    return [(key, str(name)) for key, name, is_there in sections if is_there]


def _bullets(texts: Sequence[str]) -> Bullets | None:
    return Bullets(tuple(map(printable, texts))) if texts else None


def _safe_json(value: object) -> str:
    """Return JSON that cannot end the element that it stands in, nor be read as markup."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
