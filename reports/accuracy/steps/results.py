"""What a run over measured steps leaves: every row with its error or cause, figures, a chart."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autobatch.gpus.catalogue import find_gpu
from autobatch.support.files import write_text
from autobatch.support.units import GIB
from reports.accuracy.charts import families, steps_scatter
from reports.accuracy.score import PERCENTILES, percentile, signed_error, statistics_of
from reports.accuracy.steps.configuration import Case
from reports.common.charts import write
from reports.common.journal import Record
from reports.common.results import csv_text, today, versions

_COLUMNS = (
    "set source model config gpu world_size sharding precision optimizer batch_per_gpu "
    "seq_or_image checkpointing metric measured_gib predicted_gib error cause assumptions"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A row with a measured and a predicted figure."""

    case: Case
    measured_bytes: int
    predicted_bytes: int

    @property
    def error(self) -> float:
        return signed_error(self.predicted_bytes, self.measured_bytes)


def write_results(
    cases: Sequence[Case], found: Mapping[str, Record], out: Path, *, words: str
) -> str:
    """Write errors.csv, summary.json and the charts; return the figures as text."""
    scored = scored_of(cases, found)
    facts = summary_of(cases, scored, found) | {
        "kind": "steps",
        "command": words,
        "versions": versions("torch", "transformers", "peft", "torchao"),
        "date": today(),
    }
    write_text(out / "errors.csv", csv_text(_COLUMNS, _lines(cases, scored, found)))
    points = [(one.measured_bytes, one.predicted_bytes, one.case.row["set"]) for one in scored]
    write(steps_scatter(points), out / "predicted-against-measured")
    write(families(facts["by_set"]), out / "error-by-family")
    write_text(out / "summary.json", json.dumps(facts, indent=1) + "\n")
    from reports.accuracy.steps.text import figures

    return figures(facts)


def scored_of(cases: Sequence[Case], found: Mapping[str, Record]) -> list[Scored]:
    """Join rows with their predictions, where there are both."""
    scored = []
    for case in cases:
        predicted = _predicted(case, found)
        if predicted is not None and case.row.measured_bytes is not None:
            scored.append(
                Scored(
                    case=case,
                    measured_bytes=case.row.measured_bytes,
                    predicted_bytes=predicted,
                )
            )
    return scored


def _predicted(case: Case, found: Mapping[str, Record]) -> int | None:
    record = found[case.step.key] if case.step is not None else {}
    value: int | None = record.get(f"{case.row.metric}_bytes")
    return value


def summary_of(
    cases: Sequence[Case], scored: Sequence[Scored], found: Mapping[str, Record]
) -> dict[str, Any]:
    """Summarise the errors by set, sharding, precision, optimizer and metric."""
    ran_out = [case for case in cases if case.row.ran_out and _predicted(case, found) is not None]
    foretold = sum(_is_too_much(case, found) for case in ran_out)
    facts: dict[str, Any] = {"table_rows": len(cases)}
    facts |= _figures(scored)
    facts["needed"] = needed_of(scored)
    facts |= {"ran_out": len(ran_out), "ran_out_foretold": foretold}
    for name, group in _GROUPS.items():
        facts[f"by_{name}"] = _by(scored, group)
    facts["causes"] = _causes(cases, found)
    facts["assumptions"] = _assumptions(cases, found)
    return facts


def _is_too_much(case: Case, found: Mapping[str, Record]) -> bool:
    """Whether what is reserved, and a context, exceed the card of a row."""
    assert case.step is not None
    card = find_gpu(case.step.gpu)
    stated = re.search(r"(\d+)gb$", case.row["gpu"].lower())  # a card that another stands for
    capacity = int(stated[1]) * GIB if stated else card.capacity_bytes
    reserved: int = found[case.step.key]["reserved_bytes"]
    return reserved + card.context_bytes > min(capacity, card.capacity_bytes)


def needed_of(scored: Sequence[Scored]) -> dict[str, float]:
    """Return by percentile how much more than predicted the runs took, as a share."""
    shares = [one.measured_bytes / one.predicted_bytes - 1 for one in scored]
    if not shares:
        return {}
    return {str(percent): round(percentile(shares, percent), 4) for percent in PERCENTILES}


def _figures(scored: Sequence[Scored]) -> dict[str, Any]:
    errors = [one.error for one in scored]
    found = statistics_of(errors)
    if errors:
        sizes = [abs(error) for error in errors]
        found |= {
            "within_half_percent": sum(size <= 0.005 for size in sizes) / len(sizes),
            "within_3_percent": sum(size <= 0.03 for size in sizes) / len(sizes),
            "p75": percentile(sizes, 75),
            "lowest": min(errors),
            "highest": max(errors),
        }
    return {
        name: round(value, 5) if isinstance(value, float) else value
        for name, value in found.items()
    }


def _sharding(one: Scored) -> str:
    told = one.case.row["sharding"]
    for word in ("fsdp2", "fsdp1", "ddp", "none"):
        if told.startswith(word):
            return word
    return "optimizer states" if "sharding" in told else told


def _precision(one: Scored) -> str:
    return re.sub(r" \(.*", "", one.case.row["precision"])


_GROUPS = {
    "set": lambda one: one.case.row["set"],
    "model": lambda one: one.case.row["model"],
    "sharding": _sharding,
    "precision": _precision,
    "optimizer": lambda one: one.case.row["optimizer"],
    "checkpointing": lambda one: one.case.row["checkpointing"],
    "metric": lambda one: one.case.row.metric,
}


def _by(scored: Sequence[Scored], group: Any) -> dict[str, Any]:
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(group(one), []).append(one)
    return {name: _figures(members) for name, members in sorted(groups.items())}


def _causes(cases: Sequence[Case], found: Mapping[str, Record]) -> dict[str, dict[str, int]]:
    """Count the rows without a prediction by cause and source."""
    causes: dict[str, dict[str, int]] = {}
    for case in cases:
        cause = (
            case.cause or str(found[case.step.key].get("error", "")) if case.step else case.cause
        )
        if cause:
            of_source = causes.setdefault(cause, {})
            source = case.row["source"]
            of_source[source] = of_source.get(source, 0) + 1
    return dict(sorted(causes.items()))


def _assumptions(cases: Sequence[Case], found: Mapping[str, Record]) -> dict[str, int]:
    """Count the rows with a prediction by what was assumed for it."""
    counted: dict[str, int] = {}
    for case in cases:
        if case.step is not None and _predicted(case, found) is not None:
            for words in case.step.assumptions:
                counted[words] = counted.get(words, 0) + 1
    return dict(sorted(counted.items()))


def _lines(
    cases: Sequence[Case], scored: Sequence[Scored], found: Mapping[str, Record]
) -> list[dict[str, Any]]:
    errors = {id(one.case): one for one in scored}
    lines = []
    for case in cases:
        one, record = errors.get(id(case)), found[case.step.key] if case.step else {}
        lines.append(
            {
                **case.row.values,
                "metric": case.row.metric,
                "predicted_gib": _gib(_predicted(case, found)),
                "error": None if one is None else round(one.error, 5),
                "cause": case.cause or record.get("error"),
                "assumptions": "; ".join(case.step.assumptions) if case.step else None,
            }
        )
    return sorted(lines, key=lambda line: -abs(line["error"] or 0))


def _gib(value: int | None) -> float | None:
    return None if value is None else round(value / GIB, 3)
