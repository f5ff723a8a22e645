"""Measure `autobatch.tune`, each model in a fresh process.

    python -m reports.speed [--json FILE] [--models N] [--seed S] [SPEC ...]

Without a SPEC: N random timm models below 400 million parameters on an A100 of 40 GB, and a Llama
of 7 billion on an H100 of 80 GB. With --json, every result is kept as it comes in FILE with the
suffix .jsonl, and a run that was cut short goes on from there. Exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from autobatch.support.units import GIB, format_bytes
from reports.common.journal import append, read_journal
from reports.common.results import today, versions
from reports.common.zoo import random_names

GPU = "a100-40gb"
LARGE = ("hf:llama?dtype=bf16", "h100-80gb")
REPEATS = 7

Figures = dict[str, Any]

TARGETS = {
    "median_times_import_torch": 0.6,
    "median_seconds": 6.0,
    "slowest_seconds": 20.0,
    "llama_seconds": 20.0,
    "peak_rss_bytes": GIB,
    "import_seconds": 0.1,
}


def measure(spec: str, gpu: str) -> Figures:
    """Tune a model in a fresh process."""
    command = [sys.executable, "-m", "reports.speed.child", spec, gpu]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    figures: Figures = {"spec": spec, "gpu": gpu, "process_seconds": round(seconds, 2)}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return figures | {"error": last[0]}
    measured: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures | measured


def measure_start() -> Figures:
    """Time what comes on top of `import torch`, and the shortest command: medians of processes.

    Imports are timed by the interpreter itself (`-X importtime`), after torch has been imported.
    """
    package, tuner, command = zip(*(_start_once() for _ in range(REPEATS)), strict=True)
    return {
        "import_seconds": round(median(package), 4),
        "import_tune_seconds": round(median(tuner), 4),
        "help_seconds": round(median(command), 3),
    }


def _start_once() -> tuple[float, float, float]:
    code = "import torch, autobatch, autobatch.tuning.tuner"
    done = _run_python("-X", "importtime", "-c", code)
    cumulative = {
        name.strip(): int(microseconds) / 1e6
        for _, microseconds, name in (
            line.split("|") for line in done.stderr.splitlines()[1:] if line.count("|") == 2
        )
    }
    started = time.perf_counter()
    _run_python("-m", "autobatch", "--help")
    command = time.perf_counter() - started
    return cumulative["autobatch"], cumulative["autobatch.tuning.tuner"], command


def _run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)


def summarise(rows: Sequence[Figures]) -> Figures:
    """Reduce the rows to the figures that have a target."""
    measured = [row for row in rows if "seconds" in row]
    small = [row for row in measured if row["gpu"] == GPU]
    large = [row["seconds"] for row in measured if (row["spec"], row["gpu"]) == LARGE]
    summary: Figures = {}
    if small:
        ratios = [row["seconds"] / row["import_torch_seconds"] for row in small]
        summary["median_times_import_torch"] = round(median(ratios), 2)
        summary["median_seconds"] = round(median(row["seconds"] for row in small), 2)
        summary["slowest_seconds"] = max(row["seconds"] for row in small)
    if large:
        summary["llama_seconds"] = large[0]
    if measured:
        summary["peak_rss_bytes"] = max(row["peak_rss_bytes"] for row in measured)
    return summary


def markdown(row: Figures) -> str:
    """Render a row of the table below `HEADER`."""
    if "seconds" not in row:
        name, gpu, spent, error = (row[key] for key in ("spec", "gpu", "process_seconds", "error"))
        return f"| {name} | {gpu} | | | | {spent} | | | {error} |"
    cells = (
        row["spec"],
        row["gpu"],
        f"{row['parameters'] / 1e6:,.1f}",
        f"{row['seconds']:.1f}",
        f"{row['seconds'] / row['import_torch_seconds']:.2f}",
        f"{row['process_seconds']:.1f}",
        format_bytes(row["peak_rss_bytes"]),
        row.get("executions", ""),
        row.get("error") or row["ceiling"],
    )
    return f"| {' | '.join(map(str, cells))} |"


HEADER = (
    "| model | GPU | parameters (M) | tune (s) | times `import torch` | process (s) | peak RSS "
    "| executions | ceiling |\n|-|-|-|-|-|-|-|-|-|"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m reports.speed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("specs", nargs="*", metavar="SPEC", help="models to measure instead")
    parser.add_argument("--models", type=int, default=40, metavar="N", help="how many timm models")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="draw them with this seed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    options = parser.parse_args(arguments)
    log = options.json.with_suffix(".jsonl") if options.json else None
    known = read_journal(log, key=itemgetter("spec", "gpu")) if log else {}
    rows = []
    print(HEADER)
    for spec, gpu in _jobs(options.specs, options.models, options.seed):
        row = known.get((spec, gpu)) or measure(spec, gpu)
        rows.append(row)
        print(markdown(row), flush=True)
        if log and (spec, gpu) not in known:
            append(log, row)
    summary = summarise(rows) | measure_start()
    missed = [name for name, most in TARGETS.items() if summary.get(name, 0) > most]
    failed = [row["spec"] for row in rows if "error" in row]
    _print_summary(summary, missed, failed)
    if options.json and log:
        document = _document(summary, rows, options)
        options.json.write_text(json.dumps(document, indent=2) + "\n")
        log.unlink(missing_ok=True)
    return 1 if missed or failed else 0


def _jobs(specs: Sequence[str], models: int, seed: int) -> list[tuple[str, str]]:
    if specs:
        return [LARGE if spec == LARGE[0] else (spec, GPU) for spec in specs]
    return [LARGE, *((f"timm:{name}", GPU) for name in random_names(models, seed))]


def _print_summary(summary: Figures, missed: Sequence[str], failed: Sequence[str]) -> None:
    print("\n| figure | measured | target |\n|-|-|-|")
    for name, value in summary.items():
        label = name.removesuffix("_seconds").removesuffix("_bytes").replace("_", " ")
        print(f"| {label} | {_shown(name, value)} | {_shown(name, TARGETS.get(name))} |")
    for name in missed:
        print(f"missed: {name}")
    for spec in failed:
        print(f"no plan: {spec}")


def _shown(name: str, figure: float | None) -> str:
    if figure is None:
        return ""
    if name.endswith("_bytes"):
        return format_bytes(int(figure))
    return f"{figure:.2f} s" if name.endswith("_seconds") else f"{figure:.2f}"


def _document(summary: Figures, rows: Sequence[Figures], options: argparse.Namespace) -> Figures:
    return {
        "evidence": "simulated",
        "command": f"python -m reports.speed --models {options.models} --seed {options.seed}",
        "versions": versions("torch", "timm", "transformers"),
        "cores": os.cpu_count(),
        "date": today(),
        "targets": TARGETS,
        "summary": summary,
        "rows": list(rows),
    }


if __name__ == "__main__":
    sys.exit(main())
