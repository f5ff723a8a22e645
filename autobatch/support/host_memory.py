"""The memory of the host."""

from __future__ import annotations

import os

__all__ = ["free_host_bytes"]


def free_host_bytes() -> int | None:
    """Return what the host has free, caches included; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None
