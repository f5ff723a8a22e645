"""The folders that reports are written into, and which files in them may be replaced.

Invariant: a file that autobatch did not write is never replaced, and where nothing could be written
no empty folder is left.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

from autobatch.errors import FileError
from autobatch.support.files import prepared_folder

__all__ = ["GENERATOR", "Report", "refuse_files_of_others", "report_folder"]

GENERATOR = "autobatch"
"""What pages name as their generator."""

Report = Literal["plan", "comparison", "frontier", "sweep", "explanation"]

_PAGE, _TEXT = "report.html", "report.md"
_FILES: dict[Report, tuple[str, ...]] = {
    "plan": (
        *("plan.json", _PAGE, _TEXT),
        *("trials.csv", "curve.csv", "breakdown.csv", "blocks.csv", "timeline.csv"),
        *("charts/memory.svg", "charts/breakdown.svg", "charts/timeline.svg"),
    ),
    "comparison": ("comparison.json", _PAGE, _TEXT, "comparison.csv", "charts/comparison.*"),
    "frontier": ("frontier.json", _PAGE, _TEXT, "frontier.csv", "charts/frontier.*"),
    "sweep": ("sweep.json", "plan.json", _PAGE, _TEXT, "trials.csv", "charts/pareto.*"),
    "explanation": ("explanation.json", _PAGE, _TEXT, "charts/history-*.*"),
}
"""What each report replaces, by name or pattern."""

_MARKS = {
    ".html": re.compile(rf'<meta name="generator" content="{GENERATOR}">'),
    ".json": re.compile(r'\A\s*{\s*"schema_version": *\d+'),
}
"""How a file of autobatch's own begins, by which others are told apart."""

_BEGINNING = 1024
"""Characters in which the mark stands."""


@contextmanager
def report_folder(
    report: Report, folder: str | os.PathLike[str], *, has_charts: bool = True
) -> Iterator[tuple[Path, Path]]:
    """Prepare a folder and the one of its charts for what the block writes.

    The block writes the JSON or the page first, by which the other files are known to be ours.

    Raises:
        FileError: nothing can be written there, or a file would be replaced that is not ours.
    """
    refuse_files_of_others(report, folder)
    with prepared_folder(folder) as target:
        charts = target / "charts"
        with prepared_folder(charts) if has_charts else nullcontext(target) as drawings:
            yield target, drawings


def refuse_files_of_others(report: Report, folder: str | os.PathLike[str]) -> None:
    """Raise FileError if a report would replace a file in the folder that autobatch did not write.

    Pages and JSON files bear a mark. Text, tables and drawings have none, and are taken to be ours
    where a file with a mark is beside them.
    """
    target = Path(folder)
    found = [file for name in _FILES[report] for file in _existing(target, name)]
    marked = [file for file in found if file.suffix in _MARKS]
    foreign = [file for file in marked if not _is_ours(file)]
    if not foreign and not marked:
        foreign = found
    if foreign:
        raise FileError(
            f"{str(foreign[0])!r} was not written by autobatch and would be replaced: name another "
            "folder for the report, or move the file away"
        )


def _existing(folder: Path, name: str) -> Iterator[Path]:
    """Yield the files of a name that hold anything, which would be lost."""
    try:
        for file in folder.glob(name):
            if file.is_file() and file.stat().st_size:
                yield file
    except (OSError, ValueError):  # whoever writes there says what is wrong with the folder
        return


def _is_ours(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            return _MARKS[file.suffix].search(stream.read(_BEGINNING)) is not None
    except OSError:
        return False
