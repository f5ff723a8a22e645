"""One job of the report in a process of its own.

    python -m reports.hardware.child {measure,virtual,rivals} WORKLOAD FOLDER

It imports and builds first, and touches the card only when a line comes in on stdin, so that the
next child can get ready while this one measures.
"""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from autobatch.memory.trace import Trace
from reports.hardware import measure, rivals, virtual
from reports.hardware.bench import Bench, cuda_bench
from reports.hardware.findings import Findings
from reports.hardware.workloads import Case, find_case

Opener = Callable[[int | None], tuple[Bench, int | None]]


def record_path(folder: Path, kind: str, name: str) -> Path:
    return folder / f"{kind}-{name}.json"


def traces_folder(folder: Path, name: str) -> Path:
    return folder / f"traces-{name}"


def main(
    arguments: Sequence[str],
    *,
    find: Callable[[str], Case] = find_case,
    opened: Opener = cuda_bench,
) -> int:
    """Do one job; return the exit code."""
    kind, name, folder = arguments[0], arguments[1], Path(arguments[2])
    warnings.simplefilter("ignore")
    case = find(name)
    with torch.device("meta" if kind == "virtual" else "cpu"):
        workload = case.make()
    if kind == "rivals":
        for package in rivals.PACKAGES:
            rivals.installed_version(package)  # importing takes seconds
    if not sys.stdin.readline():
        return 1  # the parent is gone
    findings = Findings(record_path(folder, kind, name))
    if kind == "virtual":
        virtual.simulate_all(workload, _measured(folder, name), _real(folder, name), findings)
    else:
        with findings.stage("card"):
            bench, limit_bytes = opened(case.limit_bytes)
            findings["card"] = bench.facts()
            findings["limit_bytes"] = limit_bytes
        if findings.failed("card"):
            return 1
        if kind == "measure":
            traces = traces_folder(folder, name)
            traces.mkdir(exist_ok=True)
            measure.measure(
                workload, bench, findings, traces=traces, times_recording=case.times_recording
            )
        else:
            ceiling = _measured(folder, name)["ceiling"]["micro_batch"]
            rivals.compare(workload, bench, findings, ceiling=ceiling)
    findings["finished"] = True
    findings.save()
    return 1 if findings["errors"] else 0


def _measured(folder: Path, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(record_path(folder, "measure", name).read_text())
    return facts


def _real(folder: Path, name: str) -> list[Trace]:
    """Return the traces with the op of every allocation, the smallest first."""
    found = traces_folder(folder, name).glob("labelled-*.pickle")
    traces = [pickle.loads(path.read_bytes()) for path in found]
    return sorted(traces, key=lambda trace: trace.micro_batch)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
