"""What a report is made of: sections of paragraphs, lists, facts, tables, code and charts.

Invariant: types only. `content`, `footprint_summary`, `gpu_list` and `equivalence` say what is in a
document; the renderers (text, Markdown, HTML, the terminal) decide how it looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "Bullets",
    "Chart",
    "Code",
    "ContentBlock",
    "Document",
    "Facts",
    "Paragraph",
    "Section",
    "Table",
    "printable",
    "told_sections",
]


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Running text, with code between backticks."""

    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list of short texts."""

    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """Pairs of a name and a short text about it."""

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Cells under column names; `align` holds "l" or "r" for each column.

    Rows whose index is in `totals` are sums of the rows above.
    """

    columns: tuple[str, ...]
    align: str
    rows: tuple[tuple[str, ...], ...]
    totals: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Code:
    """Python to paste."""

    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing beside a report, by its name, and what it shows."""

    name: str
    caption: str


ContentBlock = Paragraph | Bullets | Facts | Table | Code | Chart
"""What a section is made of."""


@dataclass(frozen=True, slots=True)
class Section:
    """Blocks under a title; without a title they follow what stands before.

    A page shows what is folded only to who asks for it, because it is long and few read it.
    """

    title: str
    blocks: tuple[ContentBlock, ...]
    is_folded: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """Sections under a title and a subtitle."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]


def printable(text: str) -> str:
    """Replace control characters, which could steer a terminal, and line breaks by spaces."""
    return "".join(character if character.isprintable() else " " for character in text)


def told_sections(warnings: Sequence[str], notes: Sequence[str]) -> tuple[Section, ...]:
    """Return what must be acted on and, apart from it, what was inferred, assumed or left out."""
    told = (("Warnings", warnings), ("Notes", notes))
    return tuple(
        Section(title, (Bullets(tuple(map(printable, texts))),)) for title, texts in told if texts
    )
