"""The figures of a run: how many subjects are predicted, at what cost, and why others are not.

Invariant: listed = predicted + failed + not built + not tried, for each library.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autobatch.support.units import GIB
from reports.common.journal import Record
from reports.coverage.subjects import LIBRARIES, Subject

GPU, MICRO_BATCH = "a100-40gb", 2
PREDICTED, FAILED, NOT_BUILT = "predicted", "failed", "not built"
TOO_SLOW, TOO_LARGE, DIED = "it took too long", "it took too much memory", "the worker died"
RSS_TARGET_BYTES = GIB

Facts = dict[str, Any]


def ended(found: Record) -> Record:
    """Complete the record of a subject whose worker was ended or died."""
    library, _, name = found["key"].partition(":")
    error = found["error"]
    cause = DIED
    if error.startswith("took more than"):
        cause = TOO_LARGE if error.endswith("of memory") else TOO_SLOW
    return {
        "key": found["key"],
        "library": library,
        "name": name,
        "outcome": FAILED,
        "cause": cause,
        "error": error,
    }


def summarise(subjects: Sequence[Subject], records: Mapping[str, Record]) -> Facts:
    """Return the figures of each library, the failures, and what was not built.

    Args:
        subjects: all that the libraries list.
        records: by key; those of subjects that are no longer listed do not count.
    """
    known = [records[subject.key] for subject in subjects if subject.key in records]
    return {
        "libraries": {
            library: _figures(
                sum(subject.library == library for subject in subjects),
                [record for record in known if record["library"] == library],
            )
            for library in LIBRARIES
        },
        "failures": [_line(record) for record in known if record["outcome"] == FAILED],
        "not_built": [_line(record) for record in known if record["outcome"] == NOT_BUILT],
    }


def _line(record: Record) -> Facts:
    return {name: record.get(name, "") for name in ("library", "name", "cause", "error")}


def _figures(listed: int, records: Sequence[Record]) -> Facts:
    """Return a library's figures; the coverage is of what was built."""
    predicted = [record for record in records if record["outcome"] == PREDICTED]
    failed = sum(record["outcome"] == FAILED for record in records)
    built = len(predicted) + failed
    return {
        "listed": listed,
        "not_tried": listed - len(records),
        "not_built": len(records) - built,
        "built": built,
        "predicted": len(predicted),
        "failed": failed,
        "coverage": round(len(predicted) / built, 4) if built else None,
        "seconds": _spread(predicted, "seconds"),
        "cpu_seconds": _spread(predicted, "cpu_seconds"),
        "peak_rss_bytes": _spread(predicted, "peak_rss_bytes"),
        "rss_above_target": sum(r["peak_rss_bytes"] > RSS_TARGET_BYTES for r in predicted),
        "rss_of_the_process": sum(r["peak_rss_of"] == "process" for r in predicted),
        "with_warnings": sum(bool(record.get("warnings")) for record in predicted),
        "with_a_loss_of_their_own": sum(
            record.get("loss") in ("output.loss", "mean of output.loss", "inferred")
            for record in predicted
        ),
    }


def _spread(records: Iterable[Record], name: str) -> Facts | None:
    """Return median, 90th percentile and largest of a figure, and whose that is."""
    ordered = sorted(records, key=lambda record: float(record[name]))
    if not ordered:
        return None
    values = [record[name] for record in ordered]
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    return {
        "median": round(statistics.median(values), 3),
        "p90": round(tenths[-1], 3),
        "largest": values[-1],
        "largest_name": ordered[-1]["name"],
    }
