"""Numbers of a plan as rows, and as CSV; what needs data frames makes them of these.

Invariant: columns of bytes end in `_bytes` and hold whole numbers; each row is one observation.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from autobatch.records.codec import encode
from autobatch.records.holders import Holder
from autobatch.records.plan_record import PlanRecord
from autobatch.support.files import write_text

__all__ = ["ROWS", "Rows", "blocks", "breakdown", "curve", "timeline", "trials", "write_csv"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Observations by column; columns that a row lacks are unknown in it."""

    columns: tuple[str, ...]
    rows: tuple[Mapping[str, object], ...]

    def to_csv(self) -> str:
        r"""Render the rows as CSV, unknown values as nothing.

        >>> Rows(("a", "b"), ({"a": 1, "b": None},)).to_csv()
        'a,b\n1,\n'
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([row.get(name) for name in self.columns] for row in self.rows)
        return text.getvalue()


def trials(plan: PlanRecord) -> Rows:
    """Return every trial, in the order in which they ran."""
    columns = (
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
    )
    return Rows(columns, tuple(encode(trial) for trial in plan.trials))


def breakdown(plan: PlanRecord) -> Rows:
    """Return the bytes by category at the planned micro-batch and at the ceiling.

    With `cached` and `context`, the bytes of one footprint sum to what the device holds.
    """
    rows = tuple(
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
    )
    return Rows(tuple(rows[0]), rows)


def curve(plan: PlanRecord) -> Rows:
    """Return memory against micro-batch, smallest first, and whether each size fits the budget."""
    columns = ("micro_batch", "peak_allocated_bytes", "peak_reserved_bytes", "evidence", "fits")
    return Rows(
        columns,
        tuple(
            {**encode(point), "fits": point.peak_reserved_bytes <= plan.budget_bytes}
            for point in sorted(plan.curve, key=lambda point: point.micro_batch)
        ),
    )


def timeline(plan: PlanRecord) -> Rows:
    """Return live bytes by category over the traced windows, one row per sample."""
    rows = tuple(
        {
            "event": sample.event,
            **{f"{name.replace(' ', '_')}_bytes": size for name, size in sample.categories.items()},
            "allocated_bytes": sample.allocated_bytes,
            "reserved_bytes": sample.reserved_bytes,
        }
        for sample in plan.timeline.samples
    )
    return Rows(tuple(dict.fromkeys(name for row in rows for name in row)), rows)


def blocks(plan: PlanRecord) -> Rows:
    """Return what is alive at the peak, most bytes first; none of a plan that does not know.

    Shapes are text, such as "8x1024x768", and empty for a scalar.
    """
    return Rows(
        (*(each.name for each in fields(Holder)), "count", "size_bytes"),
        tuple(
            {
                **encode(each.holder),
                "shape": "x".join(map(str, each.holder.shape)),
                "count": each.count,
                "size_bytes": each.size_bytes,
            }
            for each in plan.peak_blocks
        ),
    )


ROWS: Mapping[str, Callable[[PlanRecord], Rows]] = {
    each.__name__: each for each in (trials, curve, breakdown, blocks, timeline)
}
"""The rows of a plan, by name."""


def write_csv(plan: PlanRecord, folder: Path) -> None:
    """Write the rows of a plan, each kind as NAME.csv; blocks only where they are known.

    Raises:
        FileError: a file cannot be written.
    """
    for name, make in ROWS.items():
        if name != "blocks" or plan.peak_blocks:
            write_text(folder / f"{name}.csv", make(plan).to_csv())
