"""What accumulation saves and costs in memory, and when it leaves the gradient unchanged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autobatch.advice.wording import window_text
from autobatch.records.evidence import MemoryPoint
from autobatch.records.footprint import Evidence
from autobatch.records.plan_record import PlanRecord
from autobatch.support.units import format_bytes
from autobatch.support.wording import count

__all__ = [
    "AccumulationRow",
    "accumulation_rows",
    "accumulation_summary",
    "equivalence_conditions",
    "extrapolate_peak",
    "other_evidence",
    "other_window",
    "samples_per_update",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class AccumulationRow:
    """One part of the memory, in the planned window and in `other_window`.

    `other_bytes` is None where it is unknown.
    """

    part: str
    planned_bytes: int
    other_bytes: int | None
    note: str


def samples_per_update(plan: PlanRecord) -> int:
    """Return the samples that the busiest GPU runs between two optimizer updates."""
    return max(map(sum, plan.split.windows))


def extrapolate_peak(plan: PlanRecord, micro_batch: int) -> int | None:
    """Extend the curve of allocated bytes in a straight line to a micro-batch.

    The line goes through the upper half of the curve, where constant terms no longer hide the
    growth. Returns None where the curve has fewer than two sizes.
    """
    points = sorted(plan.curve, key=lambda point: point.micro_batch)
    exact = [point for point in points if point.micro_batch == micro_batch]
    if exact:
        return exact[0].peak_allocated_bytes
    if len({point.micro_batch for point in points}) < 2:
        return None
    low, high = _upper_half(points)
    growth = (high.peak_allocated_bytes - low.peak_allocated_bytes) / (
        high.micro_batch - low.micro_batch
    )
    return round(high.peak_allocated_bytes + growth * (micro_batch - high.micro_batch))


def other_window(plan: PlanRecord) -> tuple[int, int] | None:
    """Return the (steps, micro-batch) to compare the plan with, for the same samples.

    That is all of them at once, or two halves where the plan takes all at once; None where there is
    a single sample.
    """
    samples = samples_per_update(plan)
    if plan.accumulation_steps > 1:
        return 1, samples
    return (2, math.ceil(samples / 2)) if samples > 1 else None


def other_evidence(plan: PlanRecord) -> Evidence:
    """Say how the memory of `other_window` is known."""
    return "predicted" if plan.otherwise is None else plan.otherwise.evidence


def accumulation_rows(plan: PlanRecord) -> tuple[AccumulationRow, ...]:
    """Compare the planned window with `other_window`, part by part, at the peak of each."""
    if other_window(plan) is None:
        return ()
    planned = _parts(plan.footprint.categories)
    other = _other_parts(plan)
    notes = {
        "weights and buffers": "the same: they do not depend on the batch",
        "optimizer state": "the same: one update per window either way",
        "gradients at the peak": "never larger than the weights, but with accumulation they stay "
        "for all later micro-batches",
        "activations and the rest": "different: they grow with the micro-batch, and only one is "
        "alive at a time",
    }
    peak = _other_peak(plan)
    return (
        *(
            AccumulationRow(
                part=part, planned_bytes=planned[part], other_bytes=other[part], note=note
            )
            for part, note in notes.items()
        ),
        AccumulationRow(
            part="peak allocated",
            planned_bytes=plan.footprint.peak_allocated_bytes,
            other_bytes=peak,
            note="the sum",
        ),
    )


def _parts(categories: Mapping[str, int]) -> dict[str, int]:
    """Sum categories up to the parts of the table."""
    weights = categories["parameters"] + categories["buffers"]
    optimizer, gradients = categories["optimizer state"], categories["gradients"]
    return {
        "weights and buffers": weights,
        "optimizer state": optimizer,
        "gradients at the peak": gradients,
        "activations and the rest": sum(categories.values()) - weights - optimizer - gradients,
    }


def _other_parts(plan: PlanRecord) -> Mapping[str, int | None]:
    """Return the parts of the other window.

    Where its peak is extrapolated, all gradients count as resident, as they are along the curve.
    """
    if plan.otherwise is not None:
        return _parts(plan.otherwise.categories)
    peak = _other_peak(plan)
    parts = _parts(plan.footprint.categories)
    parts["gradients at the peak"] = max(
        plan.footprint.gradients_bytes, plan.ceiling_footprint.gradients_bytes
    )
    del parts["activations and the rest"]
    rest = None if peak is None else peak - sum(parts.values())
    return {**parts, "activations and the rest": rest}


def _other_peak(plan: PlanRecord) -> int | None:
    other = other_window(plan)
    if plan.otherwise is not None:
        return plan.otherwise.peak_allocated_bytes
    return extrapolate_peak(plan, other[1]) if other else None


def accumulation_summary(plan: PlanRecord) -> str:
    """Say in words what accumulation saves on this model and what it costs."""
    samples = samples_per_update(plan)
    other, peak = other_window(plan), _other_peak(plan)
    source = {
        "predicted": "predicted from the traces of smaller sizes",
        "simulated": "simulated",
        "measured": "measured",
    }[other_evidence(plan)]
    if plan.otherwise is None:
        source = "predicted by extending the curve in a straight line"
    if plan.accumulation_steps == 1:
        text = (
            f"This plan needs no accumulation: {count(samples, 'sample')} per GPU fit into one "
            "forward/backward, and gradients are freed before the next one begins."
        )
        if other is None or peak is None:
            return text
        return (
            f"{text} As {other[0]} × {other[1]:,} the peak would be {format_bytes(peak)} "
            f"allocated ({source}), with the gradients resident."
        )
    text = (
        f"Each GPU runs {count(samples, 'sample')} per update as "
        f"{window_text(max(plan.split.windows, key=sum))}."
    )
    if peak is None:
        return f"{text} What they would need at once is unknown: the curve has a single size."
    verdict = "more than" if peak > plan.budget_bytes else "within"
    text = (
        f"{text} At once they would need {format_bytes(peak)} ({source}), {verdict} the budget of "
        f"{format_bytes(plan.budget_bytes)}."
    )
    if plan.otherwise is not None:
        return text
    return (
        f"{text} That figure keeps the gradients resident; without accumulation up to "
        f"{format_bytes(plan.footprint.gradients_bytes)} less is needed, because they are freed "
        "before the next forward pass."
    )


def equivalence_conditions(plan: PlanRecord) -> tuple[str, ...]:
    """List what must hold for the accumulated gradient to equal that of the whole batch."""
    weight = (
        f"1/{plan.accumulation_steps}"
        if plan.split.uniform and plan.accumulation_steps > 1
        else f"its share of the {count(plan.effective_batch, 'sample')}"
    )
    return (
        f"The loss is a mean over samples, and each micro-batch's loss is weighted by {weight}. "
        "A mean over tokens needs its share of the window's tokens instead.",
        "No layer or loss looks across the samples of a batch: BatchNorm and in-batch contrastive "
        "losses see one micro-batch, not the effective batch.",
        "Clipping, the update, zeroing the gradients and the learning-rate schedule happen once "
        "per window, not once per micro-batch.",
        "Equal means up to floating-point rounding; dropout draws other random numbers.",
    )


def _upper_half(points: Sequence[MemoryPoint]) -> tuple[MemoryPoint, MemoryPoint]:
    high = points[-1]
    below = [point for point in points if point.micro_batch < high.micro_batch]
    upper = [point for point in below if 2 * point.micro_batch >= high.micro_batch]
    return (upper[0] if upper else below[-1]), high
