"""Pieces of the messages about a SPEC."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["near", "one_line"]


def near(word: str, known: Iterable[str]) -> str:
    """Return ": did you mean ...?" with the closest names, or nothing."""
    names = difflib.get_close_matches(word, list(known), n=3)
    return f"; did you mean {' or '.join(names)}?" if names else ""


def one_line(error: BaseException) -> str:
    """Return an error's class and message in one line of bounded length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
