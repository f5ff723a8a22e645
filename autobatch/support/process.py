"""Whose process this is: the command line's own, or somebody's who imported the library."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress

__all__ = ["claim", "end_with_parent", "is_ours"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_ours = False


def claim() -> None:
    """Declare that nothing but autobatch runs in this process; the console script does."""
    global _ours
    _ours = True


def is_ours() -> bool:
    """Return whether registering a device for good disturbs nobody."""
    return _ours


def end_with_parent(parent: int) -> None:
    """Let the kernel end this process with its parent, also where its threads are stuck in C.

    Args:
        parent: the number of the process that is the parent; it may have ended already.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)
