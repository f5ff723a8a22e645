"""The memory that this process holds while one thing runs."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from autobatch.support.units import MIB
from reports.common.memory import peak_rss_bytes, resident_bytes

Scope = Literal["model", "process"]
"""What a peak is of: what ran since `begin_peak`, or the process's whole life."""

_SLACK_BYTES = 16 * MIB
"""The kernel counts pages per core and sums them up now and then."""


def begin_peak() -> Scope:
    """Forget the peak of resident memory so far, where the system lets a process do so (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    held = resident_now_bytes()
    return "model" if held and peak_rss_bytes() <= held + _SLACK_BYTES else "process"


def resident_now_bytes() -> int | None:
    """Return the resident memory of this process; None where the system does not tell."""
    return resident_bytes(os.getpid())
