"""The memory that a run may use on a real GPU, from readings before and after trials; pure.

Invariant: context + other processes + reserved + free is the capacity at every reading. NVML's
figure for this process only divides what is held outside its allocator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autobatch.support.units import MIB, format_bytes

__all__ = [
    "DeviceReading",
    "OutsideMemory",
    "budget_bytes",
    "device_notes",
    "growth_bytes",
    "outside_memory",
    "spilled_bytes",
    "usable_bytes",
]

_NOTABLE_BYTES = 64 * MIB
"""Less than this is the driver's own noise, not a process that came or grew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReading:
    """One reading of a GPU's memory.

    Attributes:
        capacity_bytes: total of cudaMemGetInfo.
        free_bytes: free of cudaMemGetInfo.
        reserved_bytes: held by this process's caching allocator at that instant.
        allowed_bytes: torch.cuda.set_per_process_memory_fraction times the capacity; None where
            the fraction is 1.
        own_bytes: NVML's figure for this process, context and reserved; None where unknown.
        parent_bytes: NVML's figure for the process that started this one; 0 where it is not on the
            GPU, or unknown.
    """

    capacity_bytes: int
    free_bytes: int
    reserved_bytes: int
    allowed_bytes: int | None = None
    own_bytes: int | None = None
    parent_bytes: int = 0

    @property
    def outside_bytes(self) -> int:
        """What is held outside this process's allocator: its context, and other processes."""
        return max(self.capacity_bytes - self.free_bytes - self.reserved_bytes, 0)

    @property
    def context_bytes(self) -> int | None:
        """The context by NVML's figure; None where unknown, or where it is another process's."""
        # in containers, this process's id may be that of another process outside
        if self.own_bytes is None or self.own_bytes < self.reserved_bytes:
            return None
        return min(self.own_bytes - self.reserved_bytes, self.outside_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutsideMemory:
    """Memory held outside this process's allocator.

    Attributes:
        context_bytes: CUDA context and loaded kernels of this process.
        others_bytes: other processes and the driver.
        split_known: False where only the sum is known; the context is then a typical one.
    """

    context_bytes: int
    others_bytes: int
    split_known: bool

    @property
    def outside_bytes(self) -> int:
        """The sum, which is known in any case."""
        return self.context_bytes + self.others_bytes


def outside_memory(*readings: DeviceReading, typical_context_bytes: int) -> OutsideMemory:
    """Return the largest context and the most that others hold, over readings of one GPU.

    Where NVML never gave this process's figure, the context is `typical_context_bytes`, or all
    that is held outside the allocator if that is less.

    >>> reading = DeviceReading(capacity_bytes=100, free_bytes=40, reserved_bytes=30, own_bytes=40)
    >>> outside_memory(reading, typical_context_bytes=25)
    OutsideMemory(context_bytes=10, others_bytes=20, split_known=True)
    """
    outside = max(reading.outside_bytes for reading in readings)
    contexts = [reading.context_bytes for reading in readings]
    known = [context for context in contexts if context is not None]
    context = min(max(known, default=typical_context_bytes), outside)
    others = max(
        max(reading.outside_bytes - (context if own is None else own), 0)
        for reading, own in zip(readings, contexts, strict=True)
    )
    return OutsideMemory(context_bytes=context, others_bytes=others, split_known=bool(known))


def usable_bytes(reading: DeviceReading, held: OutsideMemory) -> int:
    """Return what this process's allocator may reserve, before any headroom."""
    left = max(reading.capacity_bytes - held.outside_bytes, 0)
    return left if reading.allowed_bytes is None else min(left, reading.allowed_bytes)


def budget_bytes(usable: int, headroom: float) -> int:
    """Return the usable memory less a share of it in [0, 1).

    >>> budget_bytes(1000, 0.05)
    950
    """
    return int(usable * (1 - headroom))


def growth_bytes(first: OutsideMemory, last: OutsideMemory) -> int:
    """Return by how much other processes grew, or the context where the split is unknown."""
    if first.split_known and last.split_known:
        return max(last.others_bytes - first.others_bytes, 0)
    return max(last.outside_bytes - first.outside_bytes, 0)


def spilled_bytes(before: DeviceReading, peak_reserved_bytes: int) -> int:
    """Return what a trial without OOM reserved beyond the GPU, which is in the host's memory.

    Only the drivers for Windows (and WSL) move memory there, and they hide this process's figure.
    Where that is known, the excess is therefore memory that another process released meanwhile.
    """
    if before.own_bytes is not None:
        return 0
    return max(peak_reserved_bytes + before.outside_bytes - before.capacity_bytes, 0)


def device_notes(
    first: DeviceReading, last: DeviceReading, *, typical_context_bytes: int, spilled: int = 0
) -> Iterator[str]:
    """Yield notes for the user about the GPU's memory, one line each.

    Args:
        first: before the first trial.
        last: after the last trial.
        typical_context_bytes: of the context, where the split is not known.
        spilled: the most that any trial spilled into the host's memory.
    """
    before = outside_memory(first, typical_context_bytes=typical_context_bytes)
    after = outside_memory(last, typical_context_bytes=typical_context_bytes)
    capacity = format_bytes(last.capacity_bytes)
    outside, context, others = map(
        format_bytes, (after.outside_bytes, after.context_bytes, after.others_bytes)
    )
    if not after.split_known:
        yield (
            f"the driver does not say what this process holds: of the {outside} outside its "
            f"allocator (measured), {context} are assumed to be its CUDA context and {others} "
            "other processes; in a container, --pid=host lets the driver tell"
        )
    elif after.others_bytes > _NOTABLE_BYTES and last.parent_bytes > after.others_bytes // 2:
        yield (
            f"the process that asked holds {others} of {capacity} itself (its CUDA context, what "
            "it has on the GPU, its allocator's cache), which the budget of its child process "
            "leaves to it: tune before it uses the GPU, or without isolate=True, for a larger one"
        )
    elif after.others_bytes > _NOTABLE_BYTES:
        yield (
            f"other processes hold {others} of {capacity}, which the budget leaves to them: "
            "end them (nvidia-smi lists them) and tune again for a larger one"
        )
    known = before.split_known and after.split_known
    grown = growth_bytes(before, after)
    # where the split is unknown, this process's context may have grown, as it loads kernels
    if grown > _NOTABLE_BYTES + (0 if known else after.context_bytes):
        yield (
            f"other processes{'' if known else ', it seems,'} grew by {format_bytes(grown)} during "
            "the probe: tune again when they are steady, or with more headroom"
        )
    if spilled:
        yield (
            f"the driver moved {format_bytes(spilled)} beyond the card's {capacity} into the "
            "host's memory instead of an OOM, which makes every step slow: set its sysmem "
            "fallback policy to none, or use a smaller micro-batch"
        )
    allowed = last.allowed_bytes
    if allowed is not None and allowed < last.capacity_bytes - after.outside_bytes:
        yield (
            f"torch.cuda.set_per_process_memory_fraction limits this process to "
            f"{format_bytes(allowed)} of {capacity}: raise the fraction to use more"
        )
