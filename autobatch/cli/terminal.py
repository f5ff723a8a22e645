"""Documents and progress on a terminal; the only user of rich.

Invariant: text is plain where the stream is not a terminal or the user sets NO_COLOR.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TextIO

from autobatch.cli.columns import GAP, Columns, columns_of, records_of
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
    from rich.text import Text

__all__ = ["draw", "follow", "follow_all", "is_rich", "show"]

_INDENT = 2
"""Spaces before what a record has beside its title."""

_FRAME = 4
"""Characters of a frame around a line."""

_BAR = 20
"""Characters of a whole."""


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
    subtitle, room = document.subtitle, console.width - _FRAME
    has_room = len(subtitle) <= room - 2  # a line of the frame on each side
    inside = max(len(document.title), len(subtitle) + 2 if has_room else 0)
    below = Text(subtitle) if has_room else None
    console.print(Panel(title, subtitle=below, width=min(inside, room) + _FRAME, padding=(0, 1)))
    if not has_room:
        console.print(Text(subtitle))
    if document.sections and document.sections[0].title:
        console.print()
    for section in document.sections:
        if section.title:
            is_warning = section.title == "Warnings"
            # black on yellow can be read on a dark terminal and on a light one
            console.print(
                Text(section.title, style="bold black on yellow" if is_warning else "bold")
            )
        for block in section.blocks:
            console.print(_rendered(block, console.width))
        console.print()


@contextmanager
def follow(stream: TextIO, *, keeps: bool = False) -> Iterator[ProgressCallback]:
    """Yield a callback that shows progress: one live line on a terminal, else a line per step.

    Args:
        stream: where it is shown.
        keeps: whether each step has a line that stays, also on a terminal.
    """
    if keeps or not is_rich(stream):

        def show(step: Progress) -> None:
            # with its end in one piece, so that an interrupt is told on a line of its own
            stream.write(f"{_progress_line(step)}\n")
            stream.flush()

        yield show
        return
    from rich.console import Console

    console = Console(file=stream)
    with console.status("preparing") as status:
        yield lambda step: status.update(_one_line(_progress_line(step).strip(), console))


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


def _one_line(words: str, console: Console) -> Text:
    """Return text that is cut off at the end of the line, so that it never moves the ones below."""
    from rich.text import Text

    text = Text(words)
    text.truncate(max(console.width - 3, 1), overflow="ellipsis")  # a spinner stands before it
    return text


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


def _rendered(block: ContentBlock, width: int) -> RenderableType:
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
            columns = columns_of(block, width)
            return _records(block, width) if columns is None else _columns(columns, width)
        case Code(words):
            return Text(words)
        case Chart():
            return Text()


def _columns(columns: Columns, width: int) -> RenderableType:
    """Return a table in columns; with a bar beside each share, where there is room."""
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    shown = columns.table
    has_shares = shown.columns[-1] == "share" and bool(shown.totals)
    has_bars = has_shares and columns.width + GAP + _BAR <= width
    padding = (0, columns.gap - 1, 0, 0)  # the box has a space between columns
    table = Grid(box=box.SIMPLE_HEAD, pad_edge=False, padding=padding, show_edge=False)
    for name, side, wide in zip(shown.columns, shown.align, columns.widths, strict=True):
        justify: Literal["left", "right"] = "right" if side == "r" else "left"
        # a number that is cut off would be another number
        table.add_column(Text(name), justify=justify, overflow="fold", width=wide)
    if has_bars:
        table.add_column("")
    for index, row in enumerate(shown.rows):
        is_sum = index in shown.totals
        bar = [Text(_bar(row[-1]), style="dim" if is_sum else "")] if has_bars else []
        table.add_row(*map(Text, row), *bar, style="bold" if is_sum else None)
    return table


def _records(table: Table, width: int) -> RenderableType:
    """Return a table record by record."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    lines: list[RenderableType] = []
    for record in records_of(table, width - _INDENT):
        lines.append(Text(record.title, style="bold"))
        style = "bold" if record.is_total else ""
        lines += [Padding(Text(line, style=style), (0, 0, 0, _INDENT)) for line in record.lines]
    return Group(*lines)


def _bar(share: str) -> str:
    """Draw a percentage, to an eighth of a character.

    >>> _bar("50.0%"), _bar("0.1%"), _bar("-")
    ('██████████', '▏', '')
    """
    if not share.endswith("%"):
        return ""
    eighths = round(8 * _BAR * float(share.removesuffix("%")) / 100)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip() if eighths else "▏"
