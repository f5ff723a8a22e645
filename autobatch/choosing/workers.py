"""Which workers at a study live.

A worker tells that it lives: by its process, which others on the machine can see, and by a counter
that it raises every few seconds. Nothing here knows of Optuna.

Invariant: a worker that lives counts as dead only if it gave no sign of life for a minute.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Workers", "beating"]

_BEAT_S = 5.0
"""Seconds between two signs of life of a worker."""

_GRACE_S = 60.0
"""Seconds without one after which a worker on another machine counts as dead."""


class Workers:
    """The workers at a study, as far as can be seen from this process.

    Attributes:
        me: what names this worker, in plain values.
    """

    def __init__(self) -> None:
        """Name this process."""
        pid = os.getpid()
        self.me = {"machine": _machine(), "pid": pid, "started": _started(pid)}
        self._beats: dict[int, tuple[int, float]] = {}

    def lives(self, id_: int, worker: Mapping[str, Any], beat: int) -> bool:
        """Say whether the worker at a trial lives.

        Args:
            id_: of the trial.
            worker: what names it; empty where that is not known.
            beat: the last count of its signs of life.
        """
        machine = worker.get("machine")
        if machine is not None and machine == self.me["machine"]:
            return bool(_started(worker["pid"]) == worker["started"])
        now = time.monotonic()
        known = self._beats.get(id_)
        if known is None or known[0] != beat:
            self._beats[id_] = known = beat, now
        return now - known[1] < _GRACE_S


@contextlib.contextmanager
def beating(tell: Callable[[int], object]) -> Iterator[None]:
    """Give signs of life while the block runs: their count, every few seconds, by a thread."""
    over = threading.Event()

    def beat() -> None:
        for count in itertools.count(1):
            if over.wait(_BEAT_S):
                return
            with contextlib.suppress(Exception):  # one sign less
                tell(count)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _machine() -> str | None:
    """Return what names this boot of this machine, and its process ids; None where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """Return when a process began, in ticks of its machine; None where there is no such process."""
    try:
        # proc(5): field 22, after the command in parentheses, which may hold spaces
        after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after[0] in "ZX" else int(after[19])
