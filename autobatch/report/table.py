"""Numbers of plans, comparisons and frontiers as data frames; the only user of pandas.

Invariant: columns of bytes end in `_bytes` and hold whole numbers; each row is one observation.
"""

from __future__ import annotations

import pandas as pd

from autobatch.records.codec import encode
from autobatch.records.comparison import ComparisonRecord, FrontierRecord, Outcome
from autobatch.records.plan_record import PlanRecord
from autobatch.records.sweep import SweepRecord
from autobatch.report.rows import ROWS

__all__ = ["comparison", "frame", "frontier", "sweep_trials"]


def frame(plan: PlanRecord, of: str) -> pd.DataFrame:
    """Return rows of a plan, by their name in `rows.ROWS`."""
    found = ROWS[of](plan)
    return pd.DataFrame(list(found.rows), columns=list(found.columns))


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
    told = []
    for trial in record.trials:
        row = encode(trial)
        told.append({"number": row.pop("number"), **row.pop("settings"), **row})
    front = {trial.number for trial in record.front}
    frame = pd.DataFrame(told)
    return frame.assign(
        # whole numbers, also where some are unknown
        reserved_bytes=frame["reserved_bytes"].astype("Int64"),
        on_front=frame["number"].isin(front),
    )
