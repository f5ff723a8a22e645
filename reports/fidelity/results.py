"""What a run leaves beside its journal: every record, and the counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from reports.common.journal import Record

RESULTS = "results.json"
NEAR = 0.0005
"""A row is near where both peaks are off by at most this share."""


def errors(record: Record) -> tuple[float, float]:
    """Return by which share predicted allocated and reserved peaks are off; positive: too high.

    >>> errors({"bench_bytes": [100, 200], "predicted_bytes": [101, 200]})
    (0.01, 0.0)
    """
    pairs = zip(record["predicted_bytes"], record["bench_bytes"], strict=True)
    allocated, reserved = ((ours - truth) / truth for ours, truth in pairs)
    return allocated, reserved


def worst(record: Record) -> float:
    """Return the larger error of a row, without its sign."""
    return max(map(abs, errors(record)))


def is_near(record: Record) -> bool:
    """Whether both peaks of a row are within 0.05 %."""
    return record["outcome"] == "compared" and worst(record) <= NEAR


def reads_values(record: Record) -> bool:
    """Whether the loop of a row read a value of a tensor, which the bench does not compute.

    Rows that were compared before this was recorded count as reading none.
    """
    return bool(record.get("values_read"))


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Count rows and models by outcome, and say how far off predictions are."""
    compared = [record for record in records if record["outcome"] == "compared"]
    off = [worst(record) for record in compared]
    same = [
        not record["difference"]["only_bench"] and not record["difference"]["only_predicted"]
        for record in compared
    ]
    return {
        "rows": len(records),
        "compared": len(compared),
        "models": len({record["model"] for record in compared}),
        "near": sum(map(is_near, compared)),
        "byte_for_byte": sum(
            record["bench_bytes"] == record["predicted_bytes"] for record in compared
        ),
        "every_allocation": sum(same),
        "worst": max(off, default=None),
        "worst_without_values": max(
            (worst(record) for record in compared if not reads_values(record)), default=None
        ),
        "percentiles": {str(p): float(np.percentile(off, p)) for p in (50, 95, 99)} if off else {},
        "failed": sum(record["outcome"] == "failed" for record in records),
        "skipped": sum(record["outcome"] == "skipped" for record in records),
    }


def kinds(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Sum the kinds of differences up over rows, those in most rows first."""
    found: dict[tuple[str, str, str], Counter[str]] = {}
    for record in records:
        if record["outcome"] != "compared":
            continue
        seen: set[tuple[str, str, str]] = set()
        for kind in record["difference"]["kinds"]:
            key = (kind["side"], kind["op"], kind["phase"])
            totals = found.setdefault(key, Counter())
            totals["bytes_at_peak"] += kind["at_peak"] * kind["size_bytes"]
            totals["largest_bytes"] = max(totals["largest_bytes"], kind["size_bytes"])
            if key not in seen:
                totals["rows"] += 1
                seen.add(key)
    return [
        {"side": side, "op": op, "phase": phase, **totals}
        for (side, op, phase), totals in sorted(
            found.items(), key=lambda item: item[1]["rows"], reverse=True
        )
    ]
