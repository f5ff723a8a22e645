"""The NVIDIA GPUs in this machine, as the driver lists them; the only user of pynvml.

Invariant: read-only, and silent where there is no driver.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["InstalledGpu", "installed_gpus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledGpu:
    """One card; `used_bytes` is what all processes and the driver hold on it."""

    index: int
    name: str
    total_bytes: int
    used_bytes: int


def installed_gpus() -> tuple[InstalledGpu, ...]:
    """Return the GPUs of this machine, or nothing where NVML or its driver is missing."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            gpus.append(
                InstalledGpu(
                    index=index,
                    name=name if isinstance(name, str) else name.decode(),
                    total_bytes=int(memory.total),
                    used_bytes=int(memory.used),
                )
            )
        return tuple(gpus)
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()
