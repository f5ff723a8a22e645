"""A summary of measured steps as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reports.accuracy.text import percent
from reports.common.markdown import table

Facts = Mapping[str, Any]

_FIGURES = {
    "median": ("median error", "at most 0.5 %"),
    "p90": ("90th percentile", "at most 3.0 %"),
    "signed_median": ("median, signed", ""),
    "within_half_percent": ("within 0.5 %", ""),
    "within_3_percent": ("within 3 %", ""),
}
_GROUPS = {
    "by_set": "set",
    "by_model": "model",
    "by_sharding": "sharding",
    "by_precision": "precision",
    "by_optimizer": "optimizer",
    "by_checkpointing": "checkpointing",
    "by_metric": "counter",
}


def figures(facts: Facts) -> str:
    """Render the figures beside their targets."""
    rows = [
        ("rows", str(facts["table_rows"]), ""),
        ("rows with a prediction and a measured peak", str(facts["rows"]), ""),
    ]
    rows += [
        (words, percent(facts[name], 2, sign="signed" in name), target)
        for name, (words, target) in _FIGURES.items()
        if name in facts
    ]
    told = f"{facts['ran_out_foretold']} of {facts['ran_out']}"
    rows.append(("runs out of memory, foretold", told, ""))
    missing = sum(sum(sources.values()) for sources in facts["causes"].values())
    rows.append(("rows without a prediction", str(missing), ""))
    return table(("figure", "value", "target"), rows)


def section(facts: Facts) -> str:
    """Render everything below the figures: families, causes, assumptions."""
    parts = [groups(facts)]
    if facts["causes"]:
        parts.append("Rows without a prediction:")
        rows = [
            (cause, ", ".join(f"{source} {count}" for source, count in sources.items()))
            for cause, sources in facts["causes"].items()
        ]
        parts.append(table(("cause", "source and rows"), rows))
    if facts["assumptions"]:
        parts.append("What was assumed where a row does not say it:")
        parts.append(
            table(
                ("assumption", "rows"),
                ((words, str(count)) for words, count in facts["assumptions"].items()),
            )
        )
    return "\n\n".join(parts)


def groups(facts: Facts) -> str:
    """Render the errors by family of every kind."""
    heads = ("by", "", "rows", "median", "90th percentile", "lowest", "highest")
    rows = [
        (
            words if first == 0 else "",
            name,
            str(found["rows"]),
            percent(found["median"], 2),
            percent(found["p90"], 2),
            percent(found["lowest"], 2, sign=True),
            percent(found["highest"], 2, sign=True),
        )
        for key, words in _GROUPS.items()
        for first, (name, found) in enumerate(facts[key].items())
    ]
    return table(heads, rows)
