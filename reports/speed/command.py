"""Time the whole command to a written report, beside PyTorch's import.

    python -m reports.speed.command [--rounds N] [--json FILE]

Each round runs `import torch` and `autobatch probe SPEC --report` in processes of their own, one
after the other, so that both see the same state of the machine. It gives the command's time in
times of PyTorch's import plus what the plan says that it took (the model built, its inputs inferred
and the windows simulated), and plus the windows alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from reports.common.results import today, versions

SPECS = ("timm:resnet50", "hf:gpt2")
GPU, TARGET = "a100-40gb", 256
MOST = 1.5
"""The command's time at most, in times of PyTorch's import plus the simulation."""

Figures = dict[str, float]


def seconds_of(*command: str) -> float:
    """Return the wall time of a process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - started


def measure(spec: str) -> Figures:
    """Run one round."""
    torch = seconds_of("-c", "import torch")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "report"
        arguments = f"probe {spec} --target {TARGET} --gpu {GPU} --no-cache --report {folder}"
        command = seconds_of("-m", "autobatch", *arguments.split())
        plan = json.loads((folder / "plan.json").read_text())
    windows = sum(trial["seconds"] for trial in plan["trials"])
    return {
        "command_seconds": command,
        "import_torch_seconds": torch,
        "plan_seconds": plan["seconds"],
        "windows_seconds": windows,
        "times_with_plan": command / (torch + plan["seconds"]),
        "times_with_windows": command / (torch + windows),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a median is above its target."""
    parser = argparse.ArgumentParser(prog="python -m reports.speed.command", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    options = parser.parse_args(arguments)
    print(
        "| SPEC | command (s) | import torch (s) | plan (s) | windows (s) | times import and plan "
        "| times import and windows |\n|-|-|-|-|-|-|-|"
    )
    found: dict[str, Figures] = {}
    for spec in SPECS:
        rounds = [measure(spec) for _ in range(options.rounds)]
        found[spec] = row = {name: round(median(r[name] for r in rounds), 2) for name in rounds[0]}
        print(f"| {spec} | {' | '.join(f'{figure:.2f}' for figure in row.values())} |", flush=True)
    if options.json:
        document = {
            "evidence": "measured",
            "command": f"python -m reports.speed.command --rounds {options.rounds}",
            "versions": versions("torch", "timm", "transformers"),
            "cores": os.cpu_count(),
            "date": today(),
            "rows": found,
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return int(any(row["times_with_plan"] > MOST for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
