"""Options and progress of the commands that hand tasks to workers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from reports.common.pool import WorkersFailError


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def output_folder(path: Path) -> Path:
    """Make the folder of the results, unless it exists; a new one stays out of version control."""
    if not path.exists():
        path.mkdir(parents=True)
        (path / ".gitignore").write_text("*\n")
    return path


def exit_code_of(work: Callable[[], str], out: Path, journal: Path) -> int:
    """Do a report's work, print what it returns and the folder; return the command's exit code.

    Args:
        work: runs tasks, writes results and returns a summary of them.
        out: the folder of the results.
        journal: the file from which the work goes on if it is cut short.
    """
    try:
        print(work())
    except WorkersFailError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on from {journal}", file=sys.stderr)
        return 130
    print(f"\n{out}")
    return 0


def progress_bar(*more: ProgressColumn) -> Progress:
    """Return a bar on stderr, with more columns before the times."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *more,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
