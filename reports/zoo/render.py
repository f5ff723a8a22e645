"""Take a finished run into this folder: its results, and the README's section of them."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from reports.common.markdown import renew_section
from reports.zoo.results import RESULTS
from reports.zoo.text import result

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- result -->", "<!-- /result -->"


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m reports.zoo render", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, metavar="DIR", help="of a finished run")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of README and results")
    options = parser.parse_args(arguments)
    if options.run is not None and not (options.run / RESULTS).exists():
        parser.error(f"no {RESULTS} in {options.run}: finish the run first")
    if options.run is not None:
        shutil.copyfile(options.run / RESULTS, options.folder / RESULTS)
    facts = json.loads((options.folder / RESULTS).read_text())
    renew_section(options.folder / "README.md", BEGIN, END, f"\n\n{result(facts)}\n\n")
    return 0
