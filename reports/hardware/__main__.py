"""Measure on the GPU of this machine what autobatch promises, and write one JSON file.

    python -m reports.hardware [--seconds 480] [--only NAME ...] [--folder FOLDER] [--traces ZIP]
    python -m reports.hardware render [--folder FOLDER]
    python -m reports.hardware simulate [--folder FOLDER] [--traces ZIP]

Each workload runs in a process of its own. The file is written anew after each of them, as
FOLDER/<gpu>-torch<version>.json; `render` makes the tables and charts of FOLDER/README.md from all
such files. With --traces, every recorded trace is kept as well. `simulate` predicts every file's
workloads anew on the CPU, with the code of today; --traces then names the recorded ones, for the
alignments. Exit code 0: everything ran; 1: a
job failed, or time did not allow it; 2: there is no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reports.common.results import versions
from reports.hardware.bench import file_stem
from reports.hardware.child import traces_folder
from reports.hardware.jobs import Jobs, run_jobs
from reports.hardware.simulate import simulate_again
from reports.hardware.workloads import CASES, Case

FOLDER = Path(__file__).parent
CHILD = (sys.executable, "-m", "reports.hardware.child")
_PACKAGES = ("torch", "numpy", "accelerate", "lightning", "pytorch-lightning")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m reports.hardware", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "action", nargs="?", choices=("measure", "render", "simulate"), default="measure"
    )
    parser.add_argument("--seconds", type=float, default=480, metavar="S", help="for everything")
    known = [case.name for case in CASES]
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files are")
    parser.add_argument("--traces", type=Path, metavar="ZIP", help="every recorded trace")
    options = parser.parse_args(arguments)
    if options.action == "render":
        from reports.hardware.render import render  # needs matplotlib

        render(options.folder)
        return 0
    if options.action == "simulate":
        return 1 if simulate_again(options.folder, options.traces, say=print) else 0
    if not torch.cuda.is_available():
        print("there is no CUDA device here, and nothing else can be measured", file=sys.stderr)
        return 2
    cases = [case for case in CASES if not options.only or case.name in options.only]
    words = sys.argv[1:] if arguments is None else arguments
    path = measure_all(
        cases,
        command=CHILD,
        folder=options.folder,
        seconds=options.seconds,
        traces=options.traces,
        words=" ".join(["python -m reports.hardware", *words]),
    )
    if path is None:
        print("no job could open the card", file=sys.stderr)
        return 1
    print(path)
    document = json.loads(path.read_text())
    return 1 if document["not_run"] or any(_failed(row) for row in document["workloads"]) else 0


def measure_all(
    cases: Sequence[Case],
    *,
    command: Sequence[str],
    folder: Path,
    seconds: float,
    traces: Path | None,
    words: str,
) -> Path | None:
    """Run every job, and return the file; None where no card was opened."""
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="autobatch-hardware-") as scratch:
        written: list[Path] = []

        def saved(jobs: Jobs) -> None:
            document = _document(cases, jobs, words) | {"seconds": time.monotonic() - started}
            if document["device"] is not None:
                path = folder / f"{file_stem(document['device'])}.json"
                path.write_text(json.dumps(document, indent=1) + "\n")
                written[:] = [path]

        run_jobs(
            cases,
            command=command,
            folder=Path(scratch),
            seconds=seconds,
            say=partial(print, flush=True),
            saved=saved,
        )
        if traces is not None:
            _keep_traces(cases, Path(scratch), traces)
    return written[0] if written else None


def _failed(row: dict[str, Any]) -> bool:
    return any((row[kind] or {}).get("errors") for kind in ("measure", "virtual", "rivals"))


def _document(cases: Sequence[Case], jobs: Jobs, words: str) -> dict[str, Any]:
    cards = [
        facts["card"]
        for found in jobs.found.values()
        for facts in found.values()
        if "card" in facts
    ]
    return {
        "schema": 1,
        "evidence": "measured",
        "command": words,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": cards[0] if cards else None,
        "versions": versions(*_PACKAGES),
        "cores": os.cpu_count(),
        "workloads": [_row(case, jobs) for case in cases],
        "not_run": jobs.not_run,
    }


def _row(case: Case, jobs: Jobs) -> dict[str, Any]:
    found = jobs.found.get(case.name, {})
    return {
        "name": case.name,
        "what": case.what,
        "parameters": case.parameters,
        **{kind: found.get(kind) for kind in ("measure", "virtual", "rivals")},
    }


def _keep_traces(cases: Sequence[Case], scratch: Path, path: Path) -> None:
    """Put every trace into a ZIP as JSON: blocks, events and marks, as `Trace` names them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for case in cases:
            for file in sorted(traces_folder(scratch, case.name).glob("*.pickle")):
                trace = pickle.loads(file.read_bytes())
                content = {
                    "micro_batch": trace.micro_batch,
                    "accumulation_steps": trace.accumulation_steps,
                    "blocks": [
                        [b.size_bytes, b.category, b.phase, b.op, b.stream] for b in trace.blocks
                    ],
                    "events": trace.events,
                    "marks": [[m.event, m.phase, m.window, m.micro_batch] for m in trace.marks],
                }
                archive.writestr(f"{case.name}/{file.stem}.json", json.dumps(content))


if __name__ == "__main__":
    sys.exit(main())
