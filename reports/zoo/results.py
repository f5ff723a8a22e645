"""What a run leaves beside its journal: every record, and the counts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autobatch.support.files import write_text
from reports.common.journal import Record
from reports.common.results import today, versions
from reports.zoo.entries import GPU, Entry
from reports.zoo.text import result

RESULTS = "results.json"

_FOLDERS = re.compile(r"(?<=[\s('\"])/\w[^\s'\"()]*/(?=[^/\s'\"()]+)")
"""Where a file lies on this machine, as messages say it."""


def is_right(record: Record) -> bool:
    """Return whether a workload got a plan that agrees with everything it was compared with."""
    return record.get("verdict") == "right"


def summarise(records: Iterable[Record]) -> dict[str, Any]:
    """Count workloads, packages, and plans by verdict."""
    tried = [record for record in records if record["outcome"] != "skipped"]
    compared = [record for record in tried if _activations(record)]
    return {
        "workloads": len(tried),
        "packages": len({name for record in tried for name in record["packages"]}),
        "planned": sum(record["outcome"] == "planned" for record in tried),
        "right": sum(map(is_right, tried)),
        "activations_compared": len(compared),
        "activations_agree": sum(all(_activations(record)) for record in compared),
    }


def _activations(record: Record) -> list[bool]:
    checks = record.get("checks", ())
    return [check["passes"] for check in checks if check["check"] == "activations"]


def without_folders(value: Any) -> Any:
    """Return a record in which files of the machine have lost their folders."""
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, dict):
        return {name: without_folders(part) for name, part in value.items()}
    return [without_folders(part) for part in value] if isinstance(value, list) else value


def write_results(known: Mapping[str, Entry], records: Mapping[str, Record], out: Path) -> str:
    """Write the results of a run into its folder, and return them as Markdown."""
    rows = [without_folders(records[name]) for name in known if name in records]
    facts = {
        "evidence": "simulated",
        "command": "python -m reports.zoo",
        "gpu": GPU,
        "date": today(),
        "versions": versions("torch"),
        **summarise(rows),
        "rows": rows,
    }
    write_text(out / RESULTS, json.dumps(facts, indent=1) + "\n")
    return result(facts)
