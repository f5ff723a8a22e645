"""How a table is laid out in a terminal: in columns, or record by record where it is narrow.

Invariant: no word and no number is broken where a line has room for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autobatch.report.document import Table

__all__ = ["GAP", "Columns", "Record", "columns_of", "records_of"]

GAP = 3
"""Spaces from a column to the next, where there is room."""

_TIGHT = 2

_SHORT = 12
"""Characters of a cell that is kept in one line, such as a size with its unit."""

_MOST_LINES = 3
"""Of a cell or a name; of more, columns are hard to read."""

_BETWEEN = "   "
"""Parts the facts of a record in one line."""


@dataclass(frozen=True, slots=True)
class Columns:
    """A table that fits in columns.

    Attributes:
        table: without what stands in another column, too.
        widths: of the columns, in characters.
        gap: spaces between them.
    """

    table: Table
    widths: tuple[int, ...]
    gap: int

    @property
    def width(self) -> int:
        """Characters in a line."""
        return sum(self.widths) + self.gap * (len(self.widths) - 1)


@dataclass(frozen=True, slots=True)
class Record:
    """A row of a table, with the names of its columns.

    Attributes:
        title: its first cell; what it is, where that is a number.
        lines: the others.
        is_total: whether it is a sum of the rows above.
    """

    title: str
    lines: tuple[str, ...]
    is_total: bool


def columns_of(table: Table, width: int) -> Columns | None:
    """Return the columns of a table that fit into a width, the widest that do; None if none do."""
    table = _without_bytes(table) if _in_full(table, GAP).width > width else table
    for gap in (GAP, _TIGHT):
        if (full := _in_full(table, gap)).width <= width:
            return full
    least = Columns(table, tuple(map(_least, *_cells(table))), _TIGHT)
    spare = width - least.width
    if spare < 0:
        return None
    widths = list(least.widths)
    missing = [wide - narrow for wide, narrow in zip(full.widths, widths, strict=True)]
    for at in sorted(range(len(widths)), key=missing.__getitem__):
        more = min(missing[at], spare)
        widths[at] += more
        spare -= more
    lines = (
        _lines(cell, width)
        for row in (table.columns, *table.rows)
        for cell, width in zip(row, widths, strict=True)
    )
    return replace(least, widths=tuple(widths)) if max(lines) <= _MOST_LINES else None


def records_of(table: Table, width: int) -> list[Record]:
    """Return the rows of a table as records, whose lines are not longer than a width can be.

    >>> table = Table(("card", "steps", "ceiling"), "lrr", (("t4", "2", "1,024"),))
    >>> records_of(table, 30)
    [Record(title='t4', lines=('steps 2   ceiling 1,024',), is_total=False)]
    """
    records = []
    for index, row in enumerate(table.rows):
        title = f"{table.columns[0]} {row[0]}" if table.align[0] == "r" else row[0]
        facts = [f"{name} {cell}" for name, cell in zip(table.columns, row, strict=True) if cell]
        lines: list[str] = []
        for fact in facts[1:] if row[0] else facts:
            if lines and len(lines[-1]) + len(_BETWEEN) + len(fact) <= width:
                lines[-1] += _BETWEEN + fact
            else:
                lines.append(fact)
        records.append(Record(title, tuple(lines), index in table.totals))
    return records


def _without_bytes(table: Table) -> Table:
    """Return a table without exact bytes, where sizes stand beside them."""
    if not {"bytes", "size"} <= set(table.columns):
        return table
    at = table.columns.index("bytes")
    return replace(
        table,
        columns=table.columns[:at] + table.columns[at + 1 :],
        align=table.align[:at] + table.align[at + 1 :],
        rows=tuple(row[:at] + row[at + 1 :] for row in table.rows),
    )


def _cells(table: Table) -> list[tuple[str, ...]]:
    return [table.columns, *table.rows]


def _in_full(table: Table, gap: int) -> Columns:
    widths = (max(map(len, column)) for column in zip(*_cells(table), strict=True))
    return Columns(table, tuple(widths), gap)


def _least(name: str, *cells: str) -> int:
    """Return the least width of a column: its longest word, and all of its short cells.

    >>> _least("est. s/window", "14.6 GiB", "0.0334 (0.0294-0.0380)")
    15
    """
    words = [word for text in (name, *cells) for word in text.split()]
    short = (cell for cell in cells if len(cell) <= _SHORT)
    return max(map(len, [*words, *short]), default=0)


def _lines(text: str, width: int) -> int:
    """Count the lines of a text that is broken between words.

    >>> _lines("est. seconds a window", 8)
    3
    """
    lines, left = 1, width
    for word in text.split():
        if len(word) > left:
            lines, left = lines + 1, width
        left -= len(word) + 1
    return lines
