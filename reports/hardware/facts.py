"""What the tables and the chart both read in a document: figures by name, and errors.

Invariant: what a document does not hold is None.
"""

from __future__ import annotations

from typing import Any

Facts = dict[str, Any]


def get(facts: Any, *names: str) -> Any:
    """Return what lies under nested names; None where one of them is missing."""
    for name in names:
        if not isinstance(facts, dict):
            return None
        facts = facts.get(name)
    return facts


def at_ceiling(row: Facts) -> Facts:
    """Return what is known of a workload's peaks at its measured ceiling; {} if nothing."""
    size = get(row, "measure", "ceiling", "micro_batch")
    sizes = get(row, "measure", "extrapolation", "sizes") or []
    return next((facts for facts in sizes if facts["micro_batch"] == size), {})


def error_at_ceiling(row: Facts, source: str, what: str) -> float | None:
    """Return the relative error of a predicted peak at the ceiling."""
    at = at_ceiling(row)
    said, measured = get(at, source, what), get(at, "measured", what)
    return None if said is None or not measured else said / measured - 1


def virtual_errors(row: Facts, what: str) -> list[float]:
    """Return the virtual GPU's relative error at each measured size, the smallest first."""
    measured = {
        trial["micro_batch"]: trial[f"peak_{what}"]
        for trial in get(row, "measure", "trials") or []
        if not trial["oom"] and not trial["alloc_retries"]
    }
    said = {size["micro_batch"]: size[what] for size in get(row, "virtual", "sizes") or []}
    return [said[size] / measured[size] - 1 for size in sorted(measured) if size in said]


def virtual_error(row: Facts, what: str) -> float | None:
    """Return the virtual GPU's relative error at the largest measured size."""
    return next(reversed(virtual_errors(row, what)), None)
