"""Take a finished run into this folder: its rows, summary and charts, and the README's result."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from reports.common.markdown import renew_section
from reports.coverage.text import result

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- result -->", "<!-- /result -->"
FILES = ("coverage.csv", "summary.json", "seconds.svg", "memory.svg")


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m reports.coverage render", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, metavar="DIR", help="of a finished run")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of README and results")
    options = parser.parse_args(arguments)
    if options.run is not None and not (options.run / "summary.json").exists():
        parser.error(f"no summary.json in {options.run}: finish the run first")
    render(options.run, options.folder)
    return 0


def render(run: Path | None, folder: Path) -> None:
    """Copy the results of a run, if there is one, and renew the README from the summary."""
    if run is not None:
        for name in FILES:
            shutil.copyfile(run / name, folder / name)
    facts = json.loads((folder / "summary.json").read_text())
    charts = "![Time of a prediction](seconds.svg)\n\n![Resident memory](memory.svg)"
    renew_section(folder / "README.md", BEGIN, END, f"\n\n{result(facts)}\n\n{charts}\n\n")
