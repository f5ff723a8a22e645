"""Numbers of plans, comparisons and frontiers as data frames and CSV; the only user of pandas.

Invariant: columns of bytes end in `_bytes` and hold whole numbers; each row is one observation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

import pandas as pd

from autobatch.records.codec import encode
from autobatch.records.comparison import ComparisonRecord, FrontierRecord, Outcome
from autobatch.records.holders import Holder
from autobatch.records.plan_record import PlanRecord
from autobatch.records.sweep import SweepRecord
from autobatch.support.files import write_text

__all__ = [
    "FRAMES",
    "blocks",
    "breakdown",
    "comparison",
    "curve",
    "frontier",
    "sweep_trials",
    "timeline",
    "trials",
    "write_csv",
]


def trials(plan: PlanRecord) -> pd.DataFrame:
    """Return every trial, in the order in which they ran."""
    return pd.DataFrame(
        [encode(trial) for trial in plan.trials],
        columns=[
            "micro_batch",
            "accumulation_steps",
            "fits",
            "oom",
            "alloc_retries",
            "peak_allocated_bytes",
            "peak_reserved_bytes",
            "seconds",
            "window_seconds",
            "evidence",
        ],
    )


def breakdown(plan: PlanRecord) -> pd.DataFrame:
    """Return the bytes by category at the planned micro-batch and at the ceiling.

    With `cached` and `context`, the bytes of one footprint sum to what the device holds.
    """
    rows = [
        {
            "at": at,
            "micro_batch": footprint.micro_batch,
            "category": category,
            "size_bytes": size,
            "evidence": footprint.evidence,
        }
        for at, footprint in (("plan", plan.footprint), ("ceiling", plan.ceiling_footprint))
        for category, size in [
            *footprint.categories.items(),
            ("cached", footprint.cached_bytes),
            ("context", footprint.context_bytes),
        ]
    ]
    return pd.DataFrame(rows)


def curve(plan: PlanRecord) -> pd.DataFrame:
    """Return memory against micro-batch, smallest first, and whether each size fits the budget."""
    points = sorted(plan.curve, key=lambda point: point.micro_batch)
    frame = pd.DataFrame(
        [encode(point) for point in points],
        columns=["micro_batch", "peak_allocated_bytes", "peak_reserved_bytes", "evidence"],
    )
    return frame.assign(fits=frame["peak_reserved_bytes"] <= plan.budget_bytes)


def timeline(plan: PlanRecord) -> pd.DataFrame:
    """Return live bytes by category over the traced windows, one row per sample."""
    return pd.DataFrame(
        [
            {
                "event": sample.event,
                **{
                    f"{name.replace(' ', '_')}_bytes": size
                    for name, size in sample.categories.items()
                },
                "allocated_bytes": sample.allocated_bytes,
                "reserved_bytes": sample.reserved_bytes,
            }
            for sample in plan.timeline.samples
        ]
    )


def blocks(plan: PlanRecord) -> pd.DataFrame:
    """Return what is alive at the peak, most bytes first; none of a plan that does not know.

    Shapes are text, such as "8x1024x768", and empty for a scalar.
    """
    rows = [
        {
            **encode(each.holder),
            "shape": "x".join(map(str, each.holder.shape)),
            "count": each.count,
            "size_bytes": each.size_bytes,
        }
        for each in plan.peak_blocks
    ]
    columns = [each.name for each in fields(Holder)] + ["count", "size_bytes"]
    return pd.DataFrame(rows, columns=columns)


FRAMES: Mapping[str, Callable[[PlanRecord], pd.DataFrame]] = {
    each.__name__: each for each in (trials, curve, breakdown, blocks, timeline)
}
"""The data frames of a plan, by name."""

_WHOLE = ("ceiling", "micro_batch", "accumulation_steps", "short_bytes")
"""Columns of outcomes that are whole numbers, also where some are unknown."""


def comparison(compared: ComparisonRecord) -> pd.DataFrame:
    """Return one row per card of a comparison, in order; seconds and costs are estimates."""
    frame = pd.DataFrame(
        [
            {
                "gpu": card.gpu.name,
                "capacity_bytes": card.gpu.capacity_bytes,
                **_outcome(card.outcome),
                "price_per_hour": card.price_per_hour,
                "estimated_cost_per_million": card.cost_per_million,
            }
            for card in compared.cards
        ]
    )
    return frame.astype(dict.fromkeys(_WHOLE, "Int64"))


def frontier(found: FrontierRecord) -> pd.DataFrame:
    """Return one row per value of a parameter, the smallest first."""
    frame = pd.DataFrame(
        [
            {
                found.parameter: point.value,
                **_outcome(point.outcome),
                f"{found.unit}_per_second": found.throughput(point),
                "bucket": point.bucket,
            }
            for point in found.points
        ]
    )
    return frame.astype(dict.fromkeys((*_WHOLE, "bucket"), "Int64"))


def _outcome(outcome: Outcome) -> dict[str, object]:
    window = outcome.window
    return {
        "fits": outcome.fits,
        "ceiling": outcome.ceiling,
        "ceiling_at_least": outcome.ceiling_at_least,
        "micro_batch": outcome.micro_batch,
        "accumulation_steps": outcome.accumulation_steps,
        "likelihood": outcome.likelihood,
        "ceiling_likelihood": outcome.ceiling_likelihood,
        "short_bytes": outcome.short_bytes,
        "window_seconds": None if window is None else window.seconds,
        "window_seconds_low": None if window is None else window.low,
        "window_seconds_high": None if window is None else window.high,
        "bound": None if window is None else window.bound,
        "window_evidence": None if window is None else window.evidence,
        "failure": outcome.failure,
    }


def sweep_trials(record: SweepRecord) -> pd.DataFrame:
    """Return the trials of a sweep, with a column for each lever."""
    rows = []
    for trial in record.trials:
        row = encode(trial)
        rows.append({"number": row.pop("number"), **row.pop("settings"), **row})
    front = {trial.number for trial in record.front}
    frame = pd.DataFrame(rows)
    return frame.assign(
        # whole numbers, also where some are unknown
        reserved_bytes=frame["reserved_bytes"].astype("Int64"),
        on_front=frame["number"].isin(front),
    )


def write_csv(plan: PlanRecord, folder: Path) -> None:
    """Write trials.csv, breakdown.csv, curve.csv and timeline.csv.

    Raises:
        FileError: a file cannot be written.
    """
    for make in (trials, breakdown, curve, timeline):
        write_text(folder / f"{make.__name__}.csv", make(plan).to_csv(index=False))
