"""A command that was interrupted: what is told of it, and its exit code."""

from __future__ import annotations

import contextlib
import sys

from autobatch.support.interrupts import TERMINATED, is_terminated

__all__ = ["tell_interrupt"]

_INTERRUPTED = 130


def tell_interrupt(kept: str = "") -> int:
    """Say in a line that the command was interrupted, and what is kept; return the exit code."""
    if is_terminated():
        how, code = "terminated", TERMINATED
    else:
        how, code = "interrupted", _INTERRUPTED
    if sys.stderr is not None:
        above = "\n" if sys.stderr.isatty() else ""  # below the ^C that the terminal shows
        with contextlib.suppress(OSError):  # the exit code tells it, too
            print(f"{above}autobatch: {how}{kept}", file=sys.stderr)
    return code
