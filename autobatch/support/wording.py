"""Pieces of messages: an error in one line, names alike, the first of many names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = ["listed", "near", "one_line"]


def one_line(error: BaseException) -> str:
    r"""Return an error's class and message in one line of bounded length.

    >>> one_line(ValueError("two\nlines")), one_line(KeyboardInterrupt())
    ('ValueError: two lines', 'KeyboardInterrupt')
    """
    name, message = type(error).__name__, " ".join(str(error).split())
    return f"{name}: {message}"[:300] if message else name


def near(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the closest names, or nothing."""
    names = difflib.get_close_matches(word, list(known), n=3)
    return f"; did you mean {' or '.join(names)}?" if names else ""


def listed(words: Sequence[str], most: int) -> str:
    """Join words with commas; of more than `most`, say how many are left out.

    >>> listed(["one", "two", "three"], 2)
    'one, two and 1 more'
    """
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
