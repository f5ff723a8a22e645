"""Which line of the user's code runs: the innermost one outside of libraries."""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType

from autobatch.memory.stacks import is_of_library, line_as_text

__all__ = ["UsersLines"]

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_OUTERMOST = os.path.join(_OURS, "devices", "session.py")
"""Who calls for windows to run is no part of them."""

_USERS, _LIBRARYS, _END = range(3)


class UsersLines:
    """Finds the line of the user's code that runs; knows files and lines that it has met."""

    def __init__(self) -> None:
        """Know no file yet."""
        self._kinds: dict[CodeType, int] = {}
        self._texts: dict[tuple[CodeType, int], str] = {}

    def current(self) -> str:
        """Return the innermost line of the user's code; empty where none of it runs."""
        kinds = self._kinds
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            kind = kinds.get(code)
            if kind is None:
                kind = kinds[code] = _kind_of(code.co_filename)
            if kind != _LIBRARYS:
                return "" if kind == _END else self._text(code, frame.f_lineno)
            frame = frame.f_back
        return ""

    def _text(self, code: CodeType, line: int) -> str:
        text = self._texts.get((code, line))
        if text is None:
            text = line_as_text(code.co_filename, line, code.co_name)
            self._texts[code, line] = text
        return text


def _kind_of(path: str) -> int:
    if path == _OUTERMOST:
        return _END
    return _LIBRARYS if path.startswith(_OURS) or is_of_library(path) else _USERS
