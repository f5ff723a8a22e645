"""Documents as plain text for pipes and `print`.

Invariant: no line of running text is longer than `WIDTH`; tables are as wide as their cells.
"""

from __future__ import annotations

import textwrap

from autobatch.report.document import (
    Bullets,
    Chart,
    Code,
    ContentBlock,
    Document,
    Facts,
    Paragraph,
    Section,
    Table,
)

__all__ = ["WIDTH", "render"]

WIDTH = 100


def render(document: Document) -> str:
    """Return the document as plain text without a trailing newline; charts are left out."""
    parts = [f"{document.title}\n{document.subtitle}"]
    parts += [_section(section) for section in document.sections]
    return "\n\n".join(parts)


def _section(section: Section) -> str:
    lines = [section.title] if section.title else []
    lines += [line for block in section.blocks for line in _block(block)]
    return "\n".join(lines)


def _block(block: ContentBlock) -> list[str]:
    match block:
        case Paragraph(text):
            return _wrap(text, "  ", "  ")
        case Bullets(items):
            return [line for item in items for line in _wrap(item, "  - ", "    ")]
        case Facts(pairs):
            width = max(len(name) for name, _ in pairs)
            return [
                line
                for name, text in pairs
                for line in _wrap(text, f"  {name:<{width}}  ", " " * (width + 4))
            ]
        case Table():
            return _table(block)
        case Code(text):
            return textwrap.indent(text, "    ").splitlines()
        case Chart():
            return []


def _table(table: Table) -> list[str]:
    cells = [table.columns, *table.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [("  " + "  ".join(map(_justify, row, widths, table.align))).rstrip() for row in cells]


def _justify(cell: str, width: int, align: str) -> str:
    return cell.rjust(width) if align == "r" else cell.ljust(width)


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )
