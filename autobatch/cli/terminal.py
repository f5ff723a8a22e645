"""Documents and progress on a terminal; the only user of rich.

Invariant: text is plain where the stream is not a terminal or the user sets NO_COLOR.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from autobatch.records.progress import Progress, ProgressCallback
from autobatch.report import text
from autobatch.report.document import (
    Bullets,
    Chart,
    Code,
    ContentBlock,
    Document,
    Facts,
    Paragraph,
    Table,
)
from autobatch.support.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["follow", "follow_all", "is_rich", "show"]


def is_rich(stream: TextIO) -> bool:
    """Return whether the stream is a terminal whose user wants colours and live progress."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def show(document: Document, stream: TextIO) -> None:
    """Print a document: with colours and boxes on a terminal, as plain text elsewhere."""
    if not is_rich(stream):
        print(text.render(document), file=stream)
        return
    from rich.console import Console

    draw(document, Console(file=stream))


def draw(document: Document, console: Console) -> None:
    """Print a document on a rich console."""
    from rich.panel import Panel
    from rich.text import Text

    title = Text(document.title, style="bold green")
    console.print(Panel(title, subtitle=Text(document.subtitle), expand=False, padding=(0, 1)))
    for section in document.sections:
        if section.title:
            is_warning = section.title == "Warnings"
            console.print(Text(section.title, style="bold yellow" if is_warning else "bold"))
        for block in section.blocks:
            console.print(_rendered(block))
        console.print()


@contextmanager
def follow(stream: TextIO, *, keeps: bool = False) -> Iterator[ProgressCallback]:
    """Yield a callback that shows progress: one live line on a terminal, else a line per step.

    Args:
        stream: where it is shown.
        keeps: whether each step has a line that stays, also on a terminal.
    """
    if keeps or not is_rich(stream):
        yield lambda step: print(_progress_line(step), file=stream, flush=True)
        return
    from rich.console import Console

    with Console(file=stream).status("preparing") as status:
        yield lambda step: status.update(_progress_line(step))


@contextmanager
def follow_all(stream: TextIO) -> Iterator[ProgressCallback]:
    """Yield a callback for work of many steps: a bar on a terminal, else a line per step."""
    if not is_rich(stream):
        with follow(stream) as progress:
            yield progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Bar(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("preparing", total=None)
        yield lambda step: bar.update(
            task, completed=step.executions, total=step.expected, description=_doing(step)
        )


def _doing(progress: Progress) -> str:
    size = "" if progress.micro_batch is None else f", micro-batch {progress.micro_batch:,}"
    return f"{progress.step}{size}"


def _progress_line(progress: Progress) -> str:
    if (trial := progress.trial) is not None:
        verdict = "ran out of memory" if trial.oom else "fits" if trial.fits else "does not fit"
        reserved = format_bytes(trial.peak_reserved_bytes)
        return f"  micro-batch {trial.micro_batch:,} {verdict}: {reserved} reserved"
    size = "" if progress.micro_batch is None else f", micro-batch {progress.micro_batch:,}"
    return f"{progress.executions + 1} of about {progress.expected}: {progress.step}{size}"


def _rendered(block: ContentBlock) -> RenderableType:
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    match block:
        case Paragraph(words):
            return Text(words)
        case Bullets(items):
            grid = Grid.grid(padding=(0, 1))
            for item in items:
                grid.add_row("•", Text(item))
            return grid
        case Facts(pairs):
            grid = Grid.grid(padding=(0, 2))
            for name, words in pairs:
                grid.add_row(Text(name, style="dim"), Text(words))
            return grid
        case Table():
            table = Grid(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
            for column, side in zip(block.columns, block.align, strict=True):
                table.add_column(Text(column), justify="right" if side == "r" else "left")
            for index, row in enumerate(block.rows):
                table.add_row(*map(Text, row), style="bold" if index in block.totals else None)
            return table
        case Code(words):
            return Text(words)
        case Chart():
            return Text()
