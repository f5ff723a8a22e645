"""Which line of the user's code runs: the innermost one outside of libraries.

A stack is followed up to the innermost call of a module, mostly: what lies above a call stays the
same for as long as it runs.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from types import CodeType, FrameType

from autobatch.memory.snapshot import Stack
from autobatch.memory.stacks import is_users, line_as_text
from autobatch.memory.trace import Phase
from autobatch.support.owners import OURS

__all__ = ["UsersLines", "has_users_line", "users_line"]

_OUTERMOST = os.path.join(OURS, "devices", "session.py")
"""Who calls for windows to run is no part of them."""
_CALLS = os.path.join(OURS, "devices", "running_module.py"), "called"
"""The function in which each call of a module is followed."""

_WITHOUT: tuple[Phase, ...] = ("setup", "backward", "step")
"""Phases in which only libraries and autobatch run."""

_OF_THE_RECORDER = 4
"""Frames at the top of each stack: `current`, and three of the recorder that asks."""

_USERS, _LIBRARYS, _CALL, _END = range(4)


class UsersLines:
    """Finds the line of the user's code that runs; knows files and lines that it has met."""

    def __init__(self, above_calls: list[str | None]) -> None:
        """Know no file yet.

        Args:
            above_calls: as in `RunningModule`; lines that are found are put into it.
        """
        self._above_calls = above_calls
        self._thread = threading.get_ident()
        self._kinds: dict[int, int] = {}  # by identity: hashing code is slow
        self._codes: list[CodeType] = []  # held, so that no other code gets an identity
        self._texts: dict[tuple[int, int], str] = {}

    def current(self) -> str:
        """Return the innermost line of the user's code; empty where none of it runs.

        Each frame that is looked at becomes an object, which takes most of the time: the recorder's
        own are skipped.
        """
        kinds = self._kinds
        calls = self._above_calls if threading.get_ident() == self._thread else []
        call = len(calls)
        frame: FrameType | None = sys._getframe(_OF_THE_RECORDER)
        line = ""
        while frame is not None:
            code = frame.f_code
            kind = kinds.get(id(code))
            if kind is None:
                kind = self._kind_of(code)
            if kind == _CALL and call:
                call -= 1
                known = calls[call]
                if known is not None:
                    line = known
                    break
            elif kind == _USERS:
                line = self._text(code, frame.f_lineno)
                break
            elif kind == _END:
                break
            frame = frame.f_back
        for passed in range(call, len(calls)):
            calls[passed] = line
        return line

    def _kind_of(self, code: CodeType) -> int:
        path = code.co_filename
        kind = _CALL if (path, code.co_name) == _CALLS else _kind_of_file(path)
        self._codes.append(code)
        self._kinds[id(code)] = kind
        return kind

    def _text(self, code: CodeType, line: int) -> str:
        text = self._texts.get((id(code), line))
        if text is None:
            text = line_as_text(code.co_filename, line, code.co_name)
            self._texts[id(code), line] = text
        return text


def has_users_line(phase: Phase) -> bool:
    """Whether the user's code may run in a phase of a window."""
    return phase not in _WITHOUT


def users_line(stack: Stack) -> str:
    """Return the innermost line of the user's code in a recorded stack; empty where none is."""
    for frame in stack:
        kind = _kind_of_file(frame.filename)
        if kind == _USERS:
            return line_as_text(frame.filename, frame.line, frame.name)
        if kind == _END:
            break
    return ""


@functools.cache
def _kind_of_file(path: str) -> int:
    if path == _OUTERMOST:
        return _END
    return _USERS if is_users(path) else _LIBRARYS
