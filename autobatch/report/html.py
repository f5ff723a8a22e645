"""Documents and plans as HTML: pages that open from disk, and a fragment for notebooks.

Invariant: all are self-contained (no network; the only script is that of a plan's page), and every
string but the drawings is escaped; the markup is in templates/.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from autobatch.records.plan_record import PlanRecord
from autobatch.report import colours
from autobatch.report.content import summary
from autobatch.report.document import ContentBlock, Document
from autobatch.report.drawings import breakdown
from autobatch.report.own_files import GENERATOR
from autobatch.report.page.plan_page import css_class, plan_values
from autobatch.support.templates import render

__all__ = ["notebook", "page", "plan_page"]

_TEMPLATES = Path(__file__).parent / "templates"


def page(document: Document, drawings: Mapping[str, str]) -> str:
    """Return a whole HTML page; `drawings` holds the SVG of each chart by name."""
    return _render(
        "page.html.jinja",
        title=document.title,
        document=document,
        drawings={name: _themed(drawing) for name, drawing in drawings.items()},
        script_hash="'none'",
    )


def plan_page(plan: PlanRecord) -> str:
    """Return the page of a plan: the answer, and what its scripts make of the plan's figures."""
    script, script_hash = _script()
    return _render(
        "plan.html.jinja",
        script=script,
        script_hash=f"'sha256-{script_hash}'",
        drawings={},
        **plan_values(plan),
    )


def notebook(plan: PlanRecord) -> str:
    """Return the plan's summary as a small HTML fragment for a light or dark ground.

    Its headline is larger than those of its sections, and what is on the device is drawn below it.
    Its tables are styled in place: a notebook has none of the page's styles, maybe none at all.
    """
    return _render(
        "notebook.html.jinja",
        document=summary(plan),
        heading="h3",
        in_place=True,
        chart=breakdown(plan, adapts=True),
        drawings={},
    )


_THEME = {
    colours.INK: "--ink",
    colours.FAINT: "--faint",
    colours.GRID: "--line",
    colours.GROUND: "--ground",
    colours.BUDGET: "--budget",
    colours.BAND: "--band",
    **{colour: f"--{css_class(name)}" for name, colour in colours.CATEGORIES.items()},
}
"""Which of the page's colours takes the place of a drawing's, so that dark pages are dark, and
lines and marks are as light there as they have to be."""

_CATEGORIES = " ".join(
    f"--{css_class(name)}: {colour};" for name, colour in colours.CATEGORIES.items()
)
"""Colours of categories as the style sheet names them, where the ground is light."""


def _themed(drawing: str) -> str:
    """Return a drawing in the colours of the page, whose hues are those of the drawing."""
    return re.sub(
        "|".join(_THEME),
        lambda colour: f"var({_THEME[colour[0].lower()]})",
        drawing,
        flags=re.IGNORECASE,
    )


@cache
def _script() -> tuple[str, str]:
    """Return the script of a plan's page, and its hash as a content security policy names it."""
    script = render(_TEMPLATES, "plan.js.jinja")
    return script, base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _render(template: str, **values: object) -> str:
    return render(
        _TEMPLATES,
        template,
        colours=colours,
        generator=GENERATOR,
        categories=_CATEGORIES,
        kind_of=_kind_of,
        parts_of=_parts_of,
        split_code=_split_code,
        split_links=_split_links,
        **values,
    )


def _kind_of(block: ContentBlock) -> str:
    return type(block).__name__


_PART = 24
"""Characters of a word that stay on one line."""


def _parts_of(text: str) -> list[str]:
    """Return the parts of a cell, between which a line may end besides at its spaces.

    Names of modules, operators and files have no spaces, and would make a table too wide.

    >>> _parts_of("layers.0.self_attn bfloat16")
    ['layers.', '0.self_', 'attn bfloat16']
    """
    marked = re.sub(r"(?<=[._/:\\])(?<!\d[.:])(?=\w)", "\0", text)
    return re.sub(rf"[^\s\0]{{{_PART}}}(?=[^\s\0])", "\\g<0>\0", marked).split("\0")


def _split_code(text: str) -> list[str]:
    """Split running text at its `code`: every second part is code, without the backticks."""
    return re.split(r"`([^`]+)`", text)


def _split_links(text: str) -> list[str]:
    """Split text at its https links: every second part is a link."""
    return re.split(r"(https://[\w./-]*\w)", text)
