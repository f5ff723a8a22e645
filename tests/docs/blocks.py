"""Code blocks and links of Markdown files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

__all__ = ["PAGES", "Block", "blocks_of", "headings_of", "links_of"]

PAGES = [
    ROOT / "README.md",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
"""What users read; the site's index is made from README."""

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block: its language, its text without indentation, and where it begins."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, language: str | None = None) -> list[Block]:
    """Return the fenced blocks of a page, those of one language if it is given."""
    text = page.read_text(encoding="utf-8")
    blocks = [
        Block(
            page=page,
            line=text.count("\n", 0, found.start()) + 1,
            language=found[2],
            text=re.sub(f"^{found[1]}", "", found[3], flags=re.M),
        )
        for found in _FENCE.finditer(text)
    ]
    return [block for block in blocks if language in (None, block.language)]


def links_of(page: Path) -> Iterator[str]:
    """Yield the targets of a page's links and pictures."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"`[^`\n]*`", "", text)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def headings_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site's generator make them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    names = re.findall(r"^#+ (.+)$", text, re.M)
    plain = [re.sub(r"[^\w\- ]", "", name.lower()) for name in names]
    return {name.strip().replace(" ", "-") for name in plain}
