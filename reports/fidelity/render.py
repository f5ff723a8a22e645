"""Take a finished run into this folder: its results, the chart, and the README's section."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from reports.common.charts import write
from reports.common.markdown import renew_section
from reports.fidelity.charts import scatter
from reports.fidelity.results import RESULTS
from reports.fidelity.text import result

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- result -->", "<!-- /result -->"
CHART = "errors"


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m reports.fidelity render", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, metavar="DIR", help="of a finished run")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of README and results")
    options = parser.parse_args(arguments)
    if options.run is not None:
        if not (options.run / RESULTS).exists():
            parser.error(f"no {RESULTS} in {options.run}: finish the run first")
        shutil.copyfile(options.run / RESULTS, options.folder / RESULTS)
    facts = json.loads((options.folder / RESULTS).read_text())
    write(
        scatter([record for record in facts["records"] if record["outcome"] == "compared"]),
        options.folder / CHART,
    )
    renew_section(options.folder / "README.md", BEGIN, END, f"\n\n{result(facts)}\n\n")
    return 0
