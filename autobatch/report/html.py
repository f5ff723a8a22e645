"""Documents as HTML: a page that opens from disk, and a fragment for notebooks.

Invariant: both are self-contained (no scripts, no network), and every string but the drawings is
escaped; the markup is in templates/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from autobatch.records.plan_record import PlanRecord
from autobatch.report.content import summary
from autobatch.report.document import ContentBlock, Document
from autobatch.support.templates import render

__all__ = ["notebook", "page"]

_TEMPLATES = Path(__file__).parent / "templates"


def page(document: Document, drawings: Mapping[str, str]) -> str:
    """Return a whole HTML page; `drawings` holds the SVG of each chart by name."""
    return _render("page.html.jinja", document, drawings)


def notebook(plan: PlanRecord) -> str:
    """Return the plan's summary as a small HTML fragment, styled by the notebook itself."""
    return _render("notebook.html.jinja", summary(plan), {})


def _render(template: str, document: Document, drawings: Mapping[str, str]) -> str:
    return render(
        _TEMPLATES,
        template,
        document=document,
        drawings=drawings,
        kind_of=_kind_of,
        split_code=_split_code,
        split_links=_split_links,
    )


def _kind_of(block: ContentBlock) -> str:
    return type(block).__name__


def _split_code(text: str) -> list[str]:
    """Split running text at its `code`: every second part is code, without the backticks."""
    return re.split(r"`([^`]+)`", text)


def _split_links(text: str) -> list[str]:
    """Split text at its https links: every second part is a link."""
    return re.split(r"(https://[\w./-]*\w)", text)
