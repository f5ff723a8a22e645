"""Python's collection of cyclic garbage, while there is none worth looking for."""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Iterator

__all__ = ["collection_paused", "quick_exit"]


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Do not look for cyclic garbage by itself in a block that makes many objects without cycles.

    Each look goes over all objects of the process, of which PyTorch has a million.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def quick_exit() -> None:
    """Let the interpreter end without looking for cyclic garbage, which takes a second with torch.

    Call it where nothing but the end of the process follows. Handlers of `atexit` run as ever, and
    what was written to files that are still open, which the garbage may hold, is flushed.
    """
    writers = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    for candidate in gc.get_objects():
        if type(candidate) in writers:
            with contextlib.suppress(OSError, ValueError):  # a full disk; closed or detached
                candidate.flush()
    gc.freeze()
