"""Documents as Markdown.

Invariant: the plan's own strings cannot break out of their cell, line or code block.
"""

from __future__ import annotations

import re

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

__all__ = ["render"]


def render(document: Document) -> str:
    """Return the document as Markdown; charts link to charts/NAME.svg beside it."""
    parts = [f"# {_escape(document.title)}", _escape(document.subtitle)]
    parts += [_section(section) for section in document.sections]
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> str:
    heading = [f"## {_escape(section.title)}"] if section.title else []
    return "\n\n".join([*heading, *(_block(block) for block in section.blocks)])


def _block(block: ContentBlock) -> str:
    match block:
        case Paragraph(text):
            return _escape(text)
        case Bullets(items):
            return "\n".join(f"- {_escape(item)}" for item in items)
        case Facts(pairs):
            return "\n".join(f"- **{_escape(name)}:** {_escape(text)}" for name, text in pairs)
        case Table():
            return _table(block)
        case Code(text):
            return f"```python\n{text}```"
        case Chart(name, caption):
            return f"![{_escape(caption)}](charts/{name}.svg)"


def _table(table: Table) -> str:
    rule = "".join(" --: |" if align == "r" else " :-- |" for align in table.align)
    rows = [
        _row([_bold(cell) if index in table.totals else cell for cell in map(_escape, row)])
        for index, row in enumerate(table.rows)
    ]
    return "\n".join([_row([_escape(column) for column in table.columns]), f"|{rule}", *rows])


def _bold(text: str) -> str:
    """Return bold text; nothing stays nothing, for which Markdown would show the asterisks."""
    return f"**{text}**" if text else ""


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Escape what Markdown would read as markup: nothing in URLs, only pipes in code."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = (re.sub(r"([\\*_\[\]<>|#])", _unless_in_url, part) for part in parts[::2])
    parts[1::2] = (part.replace("|", r"\|") for part in parts[1::2])  # they would end a cell
    return "".join(parts)


def _unless_in_url(match: re.Match[str]) -> str:
    word = match.string[: match.end()].split()[-1].lstrip("(")
    return match[0] if word.startswith("https://") else f"\\{match[0]}"
