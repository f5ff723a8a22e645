"""Make the README's result from summaries: aggregates only, nothing that others measured."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autobatch.support.files import write_text
from reports.accuracy.steps import text as steps
from reports.accuracy.text import (
    budget,
    context_note,
    family_table,
    needed_table,
    summary_table,
    verdict_table,
)
from reports.common.markdown import renew_section

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- result -->", "<!-- /result -->"

_TITLES = {
    "timm-peaks": "Peaks of timm models",
    "max-batch": "Largest batches of timm models",
    "xmem": "Peaks of xMem's runs",
    "steps": "Training steps of language models",
}


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m reports.accuracy render", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="of finished runs")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of README and results.json")
    options = parser.parse_args(arguments)
    missing = [path for path in options.folders if not (path / "summary.json").exists()]
    if missing:
        parser.error(f"no summary.json in {', '.join(map(str, missing))}: finish the run first")
    render(options.folders, options.folder)
    return 0


def render(folders: Sequence[Path], folder: Path) -> None:
    """Take the summaries of finished runs into the folder, and renew its README."""
    known = _known(folder)
    for finished in folders:
        facts = json.loads((finished / "summary.json").read_text())
        known[facts["kind"]] = facts
        points = "predicted-against-measured.svg"
        chart = points if facts["kind"] == "steps" else "error-by-family.svg"
        shutil.copyfile(finished / chart, folder / f"{facts['kind']}.svg")
        if facts["kind"] == "timm-peaks":  # the picture of image models in the project's README
            shutil.copyfile(finished / points, folder / "timm-peaks-points.svg")
    ordered = {kind: known[kind] for kind in _TITLES if kind in known}
    write_text(folder / "results.json", json.dumps(ordered, indent=1) + "\n")
    sections = "".join(section(facts) for facts in ordered.values())
    renew_section(folder / "README.md", BEGIN, END, f"\n{sections}\n")


def _known(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def section(facts: Mapping[str, Any]) -> str:
    """Render one table's summary, error budget and chart."""
    kind = facts["kind"]
    if kind == "steps":
        return _steps(facts)
    versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items() if found)
    families = facts.get("by_family", {})
    points = ""
    if kind == "timm-peaks":
        points = "![Predicted against measured](timm-peaks-points.svg)\n\n"
    if kind == "max-batch":
        details = verdict_table(families)
    else:
        details = f"{needed_table(facts)}{budget(families)}\n\n{family_table(families)}"
    return f"""
### {_TITLES[kind]}

`{facts["command"]}`, {facts["date"]}; {versions}.

{summary_table(facts)}

{context_note(facts)}

{details}

{points}![Error by family]({kind}.svg)
"""


def _steps(facts: Mapping[str, Any]) -> str:
    """Render the table of measured steps."""
    versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items() if found)
    return f"""
### {_TITLES["steps"]}

`{facts["command"]}`, {facts["date"]}; {versions}.

{steps.figures(facts)}

{steps.section(facts)}

![Predicted against measured](steps.svg)
"""
