"""The card under test and what watches it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autobatch.devices.cuda.runtime import CudaRuntime
from autobatch.gpus import nvml

_INTERVAL_S = 0.01


class PeakWatch:
    """Looks at the driver's figure for the whole card from a thread of its own, all the time.

    The figure counts every process and the driver's own part, which `before_bytes` was before this
    process came. Both are None where NVML is missing or silent.
    """

    def __init__(self, look: Callable[[], int | None]):
        self._look = look
        self._lock = threading.Lock()
        self.before_bytes = look()
        self._peak_bytes = self.before_bytes
        if self.before_bytes is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> None:
        """Let the peak begin at what is used now."""
        now = self._look()
        with self._lock:
            self._peak_bytes = now

    @property
    def peak_bytes(self) -> int | None:
        """The most that was seen since the last reset."""
        return self._peak_bytes

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(_INTERVAL_S):
            used = self._look()
            with self._lock:
                if used is not None and self._peak_bytes is not None:
                    self._peak_bytes = max(self._peak_bytes, used)


def looks_at_card() -> Callable[[], int | None]:
    """Return what asks NVML for the bytes used on the current device; no CUDA context is made."""
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()  # held open, so that each look is cheap
    properties = torch.cuda.get_device_properties(0)
    uuid = str(getattr(properties, "uuid", ""))
    bus = "{:08x}:{:02x}:{:02x}.0".format(
        *(getattr(properties, f"pci_{part}_id", 0) for part in ("domain", "bus", "device"))
    )

    def look() -> int | None:
        occupancy = nvml.occupancy(uuid, bus, os.getpid())
        return None if occupancy is None else occupancy.used_bytes

    return look


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A card, and what surrounds it.

    Attributes:
        card: a `CudaRuntime`, or what plays one in a rehearsal.
        watch: the driver's view.
        limited: what makes the card refuse memory outside of a probe; a real card always does.
        accelerator: Lightning's name of the device.
    """

    card: Any
    watch: PeakWatch
    limited: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    accelerator: str = "gpu"

    def facts(self) -> dict[str, Any]:
        """Describe the card and the software on it."""
        cudnn: Any = torch.backends.cudnn
        return {
            "name": self.card.name,
            "capacity_bytes": self.card.reading().capacity_bytes,
            "compute_capability": list(self.card.capability),
            "driver": nvml.driver_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": cudnn.version() if cudnn.is_available() else None,
            "python": platform.python_version(),
            "allocator_settings": os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
            or os.environ.get("PYTORCH_ALLOC_CONF"),
        }


def file_stem(facts: Mapping[str, Any]) -> str:
    """Return the name of a card's files: "nvidia-h200-torch2.11.0"."""
    name = re.sub(r"[^a-z0-9]+", "-", facts["name"].lower()).strip("-")
    return f"{name}-torch{facts['torch'].partition('+')[0]}"


def cuda_bench(limit_bytes: int | None) -> tuple[Bench, int | None]:
    """Open the current CUDA device under a limit, which is dropped on a card that is smaller."""
    watch = PeakWatch(looks_at_card())
    card = CudaRuntime()
    capacity_bytes = card.reading().capacity_bytes
    if limit_bytes is not None and limit_bytes >= capacity_bytes:
        limit_bytes = None
    if limit_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(limit_bytes / capacity_bytes, card.index)
    return Bench(card=card, watch=watch), limit_bytes
