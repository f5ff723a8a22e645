"""What a run leaves beside its journal: every row, the summary and the charts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from autobatch.support.files import write_text
from autobatch.support.units import MIB
from reports.common.charts import write
from reports.common.journal import Record
from reports.common.results import csv_text, today, versions
from reports.coverage.charts import histograms
from reports.coverage.subjects import LIBRARIES, Subject
from reports.coverage.summary import (
    GPU,
    MICRO_BATCH,
    PREDICTED,
    RSS_TARGET_BYTES,
    summarise,
)
from reports.coverage.text import result

COLUMNS = (
    "library name outcome model head cut parameters micro_batch inputs loss seconds cpu_seconds "
    "peak_rss_bytes peak_rss_of rss_bytes rss_before_bytes allocated_bytes reserved_bytes "
    "device_bytes warnings cause error"
).split()


def write_results(subjects: Sequence[Subject], records: Mapping[str, Record], out: Path) -> str:
    """Write everything into a folder, and return the result as Markdown.

    Args:
        subjects: all that the libraries list.
        records: of those that were tried, by key.
        out: the folder.
    """
    known = [records[subject.key] for subject in subjects if subject.key in records]
    facts = {
        "gpu": GPU,
        "optimizer": "AdamW",
        "precision": "fp32",
        "micro_batch": MICRO_BATCH,
        **summarise(subjects, records),
        "versions": versions("torch", "timm", "torchvision", "transformers"),
        "date": today(),
    }
    write_text(out / "coverage.csv", table(known))
    write_text(out / "summary.json", json.dumps(facts, indent=1) + "\n")
    predicted = [record for record in known if record["outcome"] == PREDICTED]
    write(
        histograms(
            _by_library(predicted, "seconds"),
            label="seconds of one prediction",
            title="Time of a prediction",
        ),
        out / "seconds",
    )
    write(
        histograms(
            _by_library(predicted, "peak_rss_bytes", MIB),
            label="peak of the worker's resident memory (MiB); dashed: 1 GiB",
            title="Resident memory of a prediction",
            target=RSS_TARGET_BYTES / MIB,
        ),
        out / "memory",
    )
    return result(facts)


def table(records: Iterable[Record]) -> str:
    """Return every record as a line of CSV; several warnings are joined by semicolons."""
    return csv_text(
        COLUMNS,
        (record | {"warnings": "; ".join(record.get("warnings", ()))} for record in records),
    )


def _by_library(records: Iterable[Record], name: str, unit: int = 1) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {library: [] for library in LIBRARIES}
    for record in records:
        found[record["library"]].append(record[name] / unit)
    return found
