"""Where in the user's own code an error arose.

Invariant: frames of autobatch, of PyTorch and of the interpreter are left out.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

from autobatch.memory.stacks import is_users
from autobatch.support.owners import OURS

__all__ = ["Line", "UsersTraceback", "users_traceback"]

Line = tuple[str, int, str, str]
"""A file, its line, the function, and the source."""

_PACKAGES = re.compile(r"[/\\](?:site|dist)-packages[/\\]")
_PYTORCH = re.compile(r"[/\\]torch[/\\]")

_MOST = 12
"""Lines that are shown, of a recursion say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsersTraceback:
    """The part of a traceback that a user can act on.

    Attributes:
        lines: of the user's code, the innermost last; where there are none, the innermost one of a
            package that is not PyTorch.
        error: the error's own words; empty where they say nothing.
        is_syntax: whether the error's words name the line themselves.
    """

    lines: tuple[Line, ...] = ()
    error: str = ""
    is_syntax: bool = False

    @property
    def where(self) -> str:
        """The innermost line, as `train.py:8 in forward`; empty where none is known.

        >>> UsersTraceback(lines=(("/no/net.py", 8, "forward", ""),)).where
        '/no/net.py:8 in forward'
        """
        if not self.lines or self.is_syntax:
            return ""
        path, line, function, _ = self.lines[-1]
        place = f"{_shortened(path)}:{line}"
        return place if function == "<module>" else f"{place} in {function}"

    def shown(self, message: str) -> str:
        """Return the lines as Python prints them, and of the error what a message leaves out."""
        stack = traceback.StackSummary.from_list(self.lines)
        entries = stack.format()
        if len(entries) > _MOST:
            entries = [f"  [{len(entries) - _MOST} calls above are left out]\n", *entries[-_MOST:]]
        words = "".join(entries)
        if self.is_syntax or " ".join(self.error.split()) not in message:
            words += self.error
        return words


def users_traceback(error: BaseException) -> UsersTraceback:
    """Find the user's lines in the traceback of an error, or of what caused it."""
    is_syntax = isinstance(error, SyntaxError)
    said = "".join(traceback.format_exception_only(error)) if is_syntax else _said(error)
    found = [_lines(each) for each in _chain(error)]
    users = next(filter(None, (list(filter(_is_users, lines)) for lines in found)), [])
    if not users:
        others = [line for lines in found for line in lines if _is_of_package(line)]
        users = others[-1:]
    return UsersTraceback(lines=tuple(users), error=said, is_syntax=is_syntax)


def _said(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return ""  # its code is all that it says
    message = str(error)
    return f"{type(error).__name__}: {message}\n" if message else f"{type(error).__name__}\n"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it, the latest first."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _lines(error: BaseException) -> list[Line]:
    return [
        (frame.filename, frame.lineno or 0, frame.name, frame.line or "")
        for frame in traceback.extract_tb(error.__traceback__)
    ]


def _is_users(line: Line) -> bool:
    path = line[0]
    return is_users(path) and not path.startswith("<")


def _is_of_package(line: Line) -> bool:
    path = line[0]
    if path.startswith(OURS) or not _PACKAGES.search(path):
        return False
    return not _PYTORCH.search(path)


def _shortened(path: str) -> str:
    """Name a file as seen from the current folder, or from that of the packages."""
    here = os.path.join(os.getcwd(), "")
    if path.startswith(here) and not _PACKAGES.search(path):
        return path.removeprefix(here)
    return _PACKAGES.split(path)[-1]
