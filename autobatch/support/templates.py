"""Jinja2 templates, the only user of jinja2.

Invariants: whatever is not Python is escaped as HTML; a line of tags alone leaves no line behind; a
name that the template was not given is an error.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["render"]


def render(folder: Path, name: str, /, **values: Any) -> str:
    """Render the template `name` of a folder with these values."""
    return _environment(folder).get_template(name).render(values)


@cache
def _environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=lambda name: name is None or not name.endswith(".py.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
