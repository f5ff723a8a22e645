"""Options and progress of the commands that hand tasks to workers."""

from __future__ import annotations

import argparse
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
