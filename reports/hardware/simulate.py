"""The virtual side of committed files once more, with today's code and without a GPU.

Invariant: nothing that was measured changes. Alignments need the recorded traces, which are not
committed: without them they stay as they were, with the date of their file.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from autobatch.memory.trace import Allocation, Mark, Trace
from reports.hardware.findings import Findings
from reports.hardware.virtual import simulate_all
from reports.hardware.workloads import Case, find_case

Facts = dict[str, Any]


def simulate_again(
    folder: Path,
    traces: Path | None,
    *,
    say: Callable[[str], None],
    find: Callable[[str], Case] = find_case,
) -> int:
    """Rewrite the "virtual" part of every file of workloads in a folder; return how many failed.

    Args:
        folder: where the files are.
        traces: a ZIP of recorded traces, as `--traces` of a measurement leaves it.
        say: told of each workload.
        find: returns a case by its name.
    """
    failed = 0
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        for row in document.get("workloads", ()):
            if not (row["measure"] or {}).get("ceiling"):
                continue
            real = _labelled(traces, row["name"]) if traces is not None else []
            row["virtual"] = _simulated(row, real, document["date"], find(row["name"]))
            errors = row["virtual"]["errors"]
            failed += bool(errors)
            say("; ".join([row["name"], *(error["error"] for error in errors)]))
        if "workloads" in document:
            path.write_text(json.dumps(document, indent=1) + "\n")
    return failed


def _simulated(row: Facts, real: Sequence[Trace], measured: str, case: Case) -> Facts:
    before: Facts = row["virtual"] or {}
    with tempfile.TemporaryDirectory(prefix="autobatch-hardware-") as scratch:
        with torch.device("meta"):
            workload = case.make()
        findings = Findings(Path(scratch) / "virtual.json")
        simulate_all(workload, row["measure"], real, findings)
    facts = dict(findings.facts)
    del facts["stage"]
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if not real and "alignments" in before:
        facts["alignments"] = [{"date": measured} | kept for kept in before["alignments"]]
    return facts | {
        "seconds": sum(facts["stage_seconds"].values()),
        "date": now,
        "torch": torch.__version__,
    }


def _labelled(archive: Path, name: str) -> list[Trace]:
    """Return the traces of a workload that name their ops, the smallest first."""
    with zipfile.ZipFile(archive) as opened:
        names = [n for n in opened.namelist() if n.startswith(f"{name}/labelled-")]
        traces = [_trace(json.loads(opened.read(n))) for n in names]
    return sorted(traces, key=lambda trace: trace.micro_batch)


def _trace(content: Facts) -> Trace:
    return Trace(
        micro_batch=content["micro_batch"],
        accumulation_steps=content["accumulation_steps"],
        blocks=tuple(Allocation(*block) for block in content["blocks"]),
        events=tuple(content["events"]),
        marks=tuple(Mark(*mark) for mark in content["marks"]),
    )
