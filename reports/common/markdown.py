"""Tables in Markdown, and the section of a README that a report renders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from autobatch.support.files import write_text


def table(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|" + "-|" * len(heads), *lines[1:]])


def renew_section(readme: Path, begin: str, end: str, section: str) -> None:
    """Put a section between the two markers of a file; the rest of the file stays."""
    before, _, rest = readme.read_text().partition(begin)
    _, _, after = rest.partition(end)
    write_text(readme, f"{before}{begin}{section}{end}{after}")
