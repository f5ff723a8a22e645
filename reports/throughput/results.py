"""What a run leaves: every row with its estimate, errors by table and half, the README's tables."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autobatch.gpus.roofline import EFFICIENCY, Efficiency
from autobatch.support.files import write_text
from reports.common.markdown import renew_section, table
from reports.common.results import today, versions
from reports.throughput.rows import SOURCES
from reports.throughput.score import Scored, in_order, percentile, summary

__all__ = ["document_of", "render", "write_results"]

RESULTS = "results.json"
FOLDER = Path(__file__).parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
_HALVES = ("fitted", "held out")
_ERRORS = ("Rows", "Median ratio", "Median error", "90 %", "Worst", "Rank correlation")
_LEAST_ROWS = 3


def write_results(rows: Sequence[Scored], out: Path) -> str:
    """Write the results of a run into a folder; return the errors of the held out half."""
    document = document_of(rows)
    write_text(out / RESULTS, json.dumps(document, indent=1) + "\n")
    found = document["held out"].get("all")
    if found is None:
        return f"{len(rows)} rows, to all of which constants were fitted"
    return (
        f"{found['rows']} rows were not fitted to: off by {found['median']:.1%} in the median, "
        f"{found['p90']:.1%} at the 90th percentile; rank correlation {_correlation(found)}"
    )


def document_of(rows: Sequence[Scored]) -> dict[str, Any]:
    """Return all that `results.json` holds."""
    return {
        "date": today(),
        "versions": versions("torch", "timm"),
        "evidence": "estimated",
        "efficiency": _plain(EFFICIENCY),
        "range": _range(one.ratio for one in rows if one.row.half == "held out"),
        **{half: _by_table([one for one in rows if one.row.half == half]) for half in _HALVES},
        "all": _by_table(rows),
        "configurations": _configurations(rows),
        "rows": [
            {
                **asdict(one.row),
                "half": one.row.half,
                "published_per_second": one.published,
                "estimated_per_second": one.rate,
                "bound": one.bound,
            }
            for one in rows
        ],
    }


def _range(ratios: Iterable[float]) -> dict[str, float] | None:
    """Return between what shares of their estimates eight of ten windows took."""
    found = list(ratios)
    if not found:
        return None
    return {"low": percentile(found, 0.1), "high": percentile(found, 0.9)}


def _plain(efficiency: Efficiency) -> dict[str, Any]:
    """Return the constants as plain values."""
    compute = {kind: dict(shares) for kind, shares in efficiency.compute.items()}
    rest = ("waves", "kernel_seconds", "call_seconds", "link", "collective_seconds", "interference")
    return {
        "compute": compute,
        "memory": dict(efficiency.memory),
        **{name: getattr(efficiency, name) for name in rest},
    }


def _by_table(rows: Sequence[Scored]) -> dict[str, Any]:
    if not rows:
        return {}
    tables: dict[str, list[Scored]] = defaultdict(list)
    for one in rows:
        tables[one.row.table].append(one)
    found = {name: summary(tables[name]) for name in SOURCES if name in tables}
    return {**found, "all": summary(rows)}


def _configurations(rows: Sequence[Scored]) -> list[dict[str, Any]]:
    """Return, of each model and card with several rows, how many pairs are in the right order."""
    groups: dict[tuple[str, str], list[Scored]] = defaultdict(list)
    for one in rows:
        model, card = one.row.model, one.row.gpu
        groups[(model, card if one.row.unit == "tokens/s" else "all cards")].append(one)
    found = []
    for (model, card), members in groups.items():
        if len(members) < _LEAST_ROWS:
            continue
        right, pairs = in_order(members)
        group = {"model": model, "gpu": card, "rows": len(members), "right": right, "pairs": pairs}
        found.append(group)
    return found


def render(out: Path) -> None:
    """Take the results of a folder into this report."""
    text = (out / RESULTS).read_text()
    document = json.loads(text)
    write_text(FOLDER / RESULTS, text)
    known = ", ".join(f"{name} {of}" for name, of in document["versions"].items() if of)
    parts = [
        "### Rows that no constant was fitted to",
        _errors(document["held out"]),
        "### Rows that they were fitted to",
        _errors(document["fitted"]),
        "### Configurations of one model",
        _order(document["configurations"]),
        "### Every row",
        table(
            ("Table", "Model", "Card", "Configuration", "Published", "Estimated", "Ratio", "Bound"),
            map(_row, document["rows"]),
        ),
        f"{document['date']}, {known}.",
    ]
    renew_section(FOLDER / "README.md", BEGIN, END, "\n\n" + "\n\n".join(parts) + "\n\n")


def _errors(found: Mapping[str, Any]) -> str:
    return table(("Table", *_ERRORS), (_error(name, of) for name, of in found.items()))


def _error(name: str, found: Mapping[str, Any]) -> Iterable[str]:
    return (
        f"**{name}**" if name == "all" else name,
        str(found["rows"]),
        f"{found['ratio']:.2f}",
        f"{found['median']:.1%}",
        f"{found['p90']:.1%}",
        f"{found['worst']:.0%}",
        _correlation(found),
    )


def _correlation(found: Mapping[str, Any]) -> str:
    return "unknown" if found["spearman"] is None else f"{found['spearman']:.3f}"


def _order(groups: Sequence[Mapping[str, Any]]) -> str:
    right, pairs = (sum(group[name] for group in groups) for name in ("right", "pairs"))
    lines = table(
        ("Model", "Card", "Rows", "Pairs in the published order"),
        (
            (
                group["model"],
                group["gpu"],
                str(group["rows"]),
                f"{group['right']} of {group['pairs']}",
            )
            for group in groups
        ),
    )
    return f"{right} of {pairs} pairs are in the published order.\n\n{lines}"


def _row(row: Mapping[str, Any]) -> Iterable[str]:
    unit = "tokens" if row["unit"] == "tokens/s" else "images"
    told = [
        f"{row['micro_batch']} × {row['size']}",
        f"{row['accumulation']} steps" if row["accumulation"] > 1 else "",
        row["precision"],
        row["layout"],
        f"{row['sharding']} over {row['world_size']}" if row["sharding"] else "",
        f"recomputes {row['checkpointing']}" if row["checkpointing"] != "none" else "",
    ]
    ratio = row["estimated_per_second"] / row["published_per_second"]
    return (
        f"{row['table']}, {row['half']}",
        row["model"],
        row["gpu"],
        ", ".join(filter(None, told)),
        f"{row['published_per_second']:,.0f} {unit}/s",
        f"{row['estimated_per_second']:,.0f}",
        f"{ratio:.2f}",
        row["bound"],
    )
