"""Resident memory of processes, as the system tells it."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


def resident_bytes(pid: int) -> int | None:
    """Return the memory that a process holds; None where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """Return the most memory this process has held.

    `getrusage` is the fallback: on Linux it also counts the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 2**10
    scale = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
