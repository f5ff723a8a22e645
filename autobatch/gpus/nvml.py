"""The NVIDIA GPUs in this machine, as the driver sees them; the only user of pynvml.

Invariant: read-only, and silent: what the driver hides or refuses to say is None, never an error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = [
    "InstalledGpu",
    "Occupancy",
    "OtherProcess",
    "driver_version",
    "installed_gpus",
    "occupancy",
]

_Answer = TypeVar("_Answer")

_NOT_AVAILABLE = 2**64 - 1
"""NVML_VALUE_NOT_AVAILABLE as an unsigned 64-bit figure (nvml.h)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledGpu:
    """One GPU.

    Attributes:
        index: NVML's, which is that of `nvidia-smi`.
        name: as the driver prints it; None where it does not tell, as of a card that fell off the
            bus.
        total_bytes: None where the driver does not tell, as where the GPU shares the memory of the
            CPU.
        used_bytes: what all processes and the driver hold on it; None as above.
    """

    index: int
    name: str | None
    total_bytes: int | None
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherProcess:
    """Another process on the GPU; `used_bytes` is None where the driver hides it."""

    pid: int
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupancy:
    """Which processes hold a GPU's memory, as the driver sees it.

    Attributes:
        total_bytes: NVML's total, CUDA's may be smaller; None where the driver does not tell.
        used_bytes: what all processes and the driver hold; None as above.
        own_bytes: what this process holds, context included; None where the driver hides process
            ids (containers) or amounts (Windows, WSL).
        other_processes: by process id; None where this process cannot be told from the others.
    """

    total_bytes: int | None
    used_bytes: int | None
    own_bytes: int | None
    other_processes: tuple[OtherProcess, ...] | None


def installed_gpus() -> tuple[InstalledGpu, ...]:
    """Return the GPUs of this machine, or nothing where NVML or its driver is missing."""
    return _ask(_list_gpus, ())


def driver_version() -> str | None:
    """Return the driver's version, such as "580.82.07", or None where NVML is missing."""
    return _ask(lambda nvml: _text(nvml.nvmlSystemGetDriverVersion()), None)


def occupancy(uuid: str, pci_bus_id: str, pid: int) -> Occupancy | None:
    """Return which processes hold one GPU's memory, or None where NVML or the GPU is not found.

    Call it after CUDA is initialised: a process that holds nothing is not listed, which looks like
    a container that hides it. A GPU in MIG mode counts as not found, its instances as GPUs.

    Args:
        uuid: of the GPU or MIG instance, with or without its prefix "GPU-" or "MIG-".
        pci_bus_id: such as "00000000:3B:00.0"; used where no device has that UUID.
        pid: this process.
    """

    def look(nvml: Any) -> Occupancy | None:
        handle = _find(nvml, uuid, pci_bus_id)
        if handle is None:
            return None
        total_bytes, used_bytes = _memory(nvml, handle)
        used_by = _processes(nvml, handle)
        own = used_by.pop(pid, 0)
        return Occupancy(
            total_bytes=total_bytes,
            used_bytes=used_bytes,
            own_bytes=own or None,
            # not listed, or listed with nothing (containers since driver 560): any of the listed
            # may be this process, and others may be missing
            other_processes=None
            if own == 0
            else tuple(OtherProcess(pid=other, used_bytes=used_by[other]) for other in used_by),
        )

    return _ask(look, None)


def _ask(question: Callable[[Any], _Answer], unknown: _Answer) -> _Answer:
    """Call `question` between NVML's init and shutdown; return `unknown` on any failure."""
    try:
        import pynvml
    except ImportError:
        return unknown
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return unknown
    try:
        return question(pynvml)
    except pynvml.NVMLError:
        return unknown
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _list_gpus(nvml: Any) -> tuple[InstalledGpu, ...]:
    """List every device, with what the driver tells of it: one that refuses hides no other."""
    gpus = []
    for index in range(nvml.nvmlDeviceGetCount()):
        name: str | None = None
        total_bytes = used_bytes = None
        with suppress(nvml.NVMLError):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            total_bytes, used_bytes = _memory(nvml, handle)
            name = _text(nvml.nvmlDeviceGetName(handle))
        gpus.append(
            InstalledGpu(index=index, name=name, total_bytes=total_bytes, used_bytes=used_bytes)
        )
    return tuple(gpus)


def _memory(nvml: Any, handle: Any) -> tuple[int | None, int | None]:
    """Return the total and what is used; None for both where the driver does not tell."""
    with suppress(nvml.NVMLError):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        if memory.total:
            return int(memory.total), int(memory.used)
    return None, None


def _find(nvml: Any, uuid: str, pci_bus_id: str) -> Any | None:
    """Find a device by UUID, else PCI address; CUDA's indices are not NVML's."""
    for name in (uuid, f"GPU-{uuid}", f"MIG-{uuid}"):
        with suppress(nvml.NVMLError):
            handle = nvml.nvmlDeviceGetHandleByUUID(name)
            return handle if name.startswith("MIG-") or not _divided(nvml, handle) else None
    handle = nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id)
    return None if _divided(nvml, handle) else handle


def _divided(nvml: Any, handle: Any) -> bool:
    """Return whether a GPU is in MIG mode: its figures are then not those of one instance."""
    with suppress(nvml.NVMLError):  # cards before Ampere have no such mode
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    return False


def _processes(nvml: Any, handle: Any) -> dict[int, int | None]:
    """Return bytes by process id; a process listed for compute and graphics counts once."""
    refusals = (nvml.NVMLError, nvml.NVMLLibraryMismatchError)  # the latter: drivers before 510
    used_by: dict[int, int | None] = {}
    for listed in (
        nvml.nvmlDeviceGetComputeRunningProcesses,
        nvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        with suppress(*refusals):
            for process in listed(handle):
                used = process.usedGpuMemory
                known = None if used in (None, _NOT_AVAILABLE) else int(used)
                before = used_by.get(process.pid)
                used_by[process.pid] = known if before is None else max(before, known or 0)
    return used_by


def _text(name: str | bytes) -> str:
    return name if isinstance(name, str) else name.decode()
