"""What a run leaves: the error table, the summary and the charts.

Invariant: `summary.json` holds aggregates only; what others measured stays in `errors.csv`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autobatch.support.files import write_text
from autobatch.support.units import MIB
from reports.accuracy import charts
from reports.accuracy.predict import card_of
from reports.accuracy.score import (
    Bracket,
    Peak,
    brackets_of,
    causes_of,
    peaks_of,
    summarise_brackets,
    summarise_peaks,
)
from reports.accuracy.tables import Kind, Row, Settings
from reports.accuracy.text import summary_table
from reports.common.charts import write
from reports.common.journal import Record
from reports.common.results import csv_text, today, versions

_PEAK_COLUMNS = (
    "model family gpu optimizer micro_batch measured_mib predicted_mib reserved_mib error method "
    "cause"
).split()
_BRACKET_COLUMNS = (
    "model family gpu image_size ran next_size_up ceiling verdict method cause".split()
)


def write_results(
    kind: Kind,
    rows: Sequence[Row],
    found: Mapping[str, Record],
    settings: Settings,
    out: Path,
    *,
    words: str,
) -> str:
    """Write everything into a folder, and return the summary as a table.

    Args:
        kind: of the table.
        rows: of the table, as far as they were predicted.
        found: the record of each row by its key.
        settings: how they were predicted.
        out: the folder.
        words: the command, for the summary.
    """
    facts: dict[str, Any] = {
        "kind": kind.name,
        "command": words,
        "settings": asdict(settings),
        "table_rows": len(rows),
        "causes": causes_of(rows, found),
        "methods": _counts(record.get("method") for record in found.values()),
        "versions": versions("torch", "timm", "torchvision", "transformers"),
        "date": today(),
    }
    if kind.name == "max-batch":
        brackets = brackets_of(rows, found)
        facts |= _rounded(summarise_brackets(brackets))
        write_text(out / "errors.csv", _bracket_table(rows, brackets, found))
        write(charts.ceilings(brackets), out / "predicted-against-measured")
        write(charts.verdicts(brackets), out / "error-by-family")
    else:
        peaks = peaks_of(rows, found, lambda row: context_of(row, settings))
        facts |= _rounded(summarise_peaks(peaks)) | _shortages(rows, found, settings)
        write_text(out / "errors.csv", _peak_table(rows, peaks, found))
        write(charts.scatter(peaks), out / "predicted-against-measured")
        write(charts.families(facts.get("by_family", {})), out / "error-by-family")
    write_text(out / "summary.json", json.dumps(facts, indent=1) + "\n")
    return summary_table(facts)


def context_of(row: Row, settings: Settings) -> int:
    """Return what a run holds outside of its allocator: as given, else as the catalogue says."""
    if settings.context_bytes is not None:
        return settings.context_bytes
    return card_of(row.run).context_bytes


def _shortages(
    rows: Iterable[Row], found: Mapping[str, Record], settings: Settings
) -> dict[str, Any]:
    """Count runs that ran out of memory, and those of them whose prediction exceeds the card."""
    ran_out = [row for row in rows if row.ran_out and "reserved_bytes" in found[row.key]]
    if not ran_out:
        return {}
    foretold = sum(
        found[row.key]["reserved_bytes"] + context_of(row, settings)
        > (row.run.capacity_bytes or card_of(row.run).capacity_bytes)
        for row in ran_out
    )
    return {"ran_out": len(ran_out), "ran_out_foretold": foretold}


def _peak_table(rows: Iterable[Row], peaks: Iterable[Peak], found: Mapping[str, Record]) -> str:
    lines = [
        {
            **_common(peak.row, peak.family, found),
            "optimizer": peak.row.run.optimizer,
            "micro_batch": peak.row.micro_batch,
            "measured_mib": round(peak.measured_bytes / MIB),
            "predicted_mib": round(peak.predicted_bytes / MIB),
            "reserved_mib": round(peak.reserved_bytes / MIB),
            "error": round(peak.error, 4),
        }
        for peak in sorted(peaks, key=lambda peak: -abs(peak.error))
    ]
    return csv_text(_PEAK_COLUMNS, [*lines, *_failures(rows, found)])


def _bracket_table(
    rows: Iterable[Row], brackets: Iterable[Bracket], found: Mapping[str, Record]
) -> str:
    lines = [
        {
            **_common(bracket.row, bracket.family, found),
            "image_size": bracket.row.run.image_size,
            "ran": bracket.row.micro_batch,
            "next_size_up": bracket.above,
            "ceiling": bracket.ceiling,
            "verdict": bracket.verdict,
        }
        for bracket in brackets
    ]
    return csv_text(_BRACKET_COLUMNS, [*lines, *_failures(rows, found)])


def _common(row: Row, family: str, found: Mapping[str, Record]) -> dict[str, Any]:
    return {
        "model": row.run.model,
        "family": family,
        "gpu": row.run.gpu,
        "method": found[row.key]["method"],
    }


def _failures(rows: Iterable[Row], found: Mapping[str, Record]) -> list[dict[str, Any]]:
    return [
        {"model": row.run.model, "micro_batch": row.micro_batch, "cause": found[row.key]["error"]}
        for row in rows
        if "error" in found[row.key]
    ]


def _rounded(value: Any, digits: int = 4) -> Any:
    """Round shares, those of families to a tenth of a percent: they may stand for a single row."""
    if isinstance(value, Mapping):
        return {
            name: _rounded(part, 3 if name == "by_family" else digits)
            for name, part in value.items()
        }
    return round(value, digits) if isinstance(value, float) else value


def _counts(values: Iterable[str | None]) -> dict[str, int]:
    known = [value for value in values if value]
    return {value: known.count(value) for value in sorted(set(known))}
