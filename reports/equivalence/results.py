"""What a run leaves beside its journal: every record, the counts, and the table of the README."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autobatch.support.files import write_text
from reports.common.journal import Record
from reports.common.markdown import renew_section, table
from reports.common.results import today, versions

__all__ = ["is_false", "is_right", "render", "summarise", "write_results"]

RESULTS = "results.json"
FOLDER = Path(__file__).parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
HEADS = ("Case", "Equivalent", "Verdict", "Found", "Held", "Plain PyTorch", "CPU s")
_VERDICTS = {True: "equivalent", False: "not equivalent", None: "undecided"}


def is_right(record: Record) -> bool:
    """Whether the verdict is the known one."""
    return record["outcome"] == "checked" and record["equivalent"] is record["is_equivalent"]


def is_false(record: Record) -> bool:
    """Whether a case is called equivalent that is not: what must never happen."""
    called = record["outcome"] == "checked" and record["equivalent"] is True
    return called and not record["is_equivalent"]


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Count cases by their verdicts."""
    checked = [record for record in records if record["outcome"] == "checked"]
    return {
        "cases": len(records),
        "right": sum(map(is_right, records)),
        "false_equivalent": sum(map(is_false, checked)),
        "false_alarms": sum(r["equivalent"] is False and r["is_equivalent"] for r in checked),
        "undecided": sum(r["equivalent"] is None for r in checked),
        "failed": len(records) - len(checked),
    }


def write_results(records: Sequence[Record], out: Path) -> str:
    """Write the records and their counts into a folder; return the counts in one line."""
    counts = summarise(records)
    document = {
        "date": today(),
        "versions": versions("torch", "torchvision", "timm", "transformers"),
        "summary": counts,
        "records": list(records),
    }
    write_text(out / RESULTS, json.dumps(document, indent=1) + "\n")
    return ", ".join(f"{name.replace('_', ' ')}: {number}" for name, number in counts.items())


def render(out: Path) -> None:
    """Take the results of a folder into this report."""
    text = (out / RESULTS).read_text()
    document = json.loads(text)
    write_text(FOLDER / RESULTS, text)
    counts, known = document["summary"], document["versions"]
    lines = [
        f"{counts['cases']} cases, {counts['right']} right: {counts['false_equivalent']} called "
        f"equivalent that are not, {counts['false_alarms']} false alarms, "
        f"{counts['undecided']} undecided, {counts['failed']} failed.",
        f"{document['date']}, " + ", ".join(f"{name} {of}" for name, of in known.items() if of),
    ]
    rows = map(_row, document["records"])
    section = f"\n\n{lines[0]}\n\n{table(HEADS, rows)}\n\n{lines[1]}.\n\n"
    renew_section(FOLDER / "README.md", BEGIN, END, section)


def _row(record: Record) -> tuple[str, ...]:
    known = f"{'yes' if record['is_equivalent'] else 'no'}: {record['why']}"
    if record["outcome"] != "checked":
        return record["key"], known, "failed", record["error"], "", "", ""
    kinds = list(dict.fromkeys(kind for kind, _ in record["culprits"]))
    verdict = _VERDICTS[record["equivalent"]]
    return (
        record["key"],
        known,
        verdict if is_right(record) else f"**{verdict}**",
        ", ".join(kinds) or "nothing",
        f"{record['held_difference']:.0e}",
        "" if record["reference"] is None else f"{record['reference']:.0e}",
        f"{record['cpu_seconds']:.1f}",
    )
