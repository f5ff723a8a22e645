"""What a recorded memory snapshot shows, as plain records.

Invariant: what is held, with rounding, sums to the allocated bytes of the explained moment, and
allocated, awaited and free bytes to the reserved ones; every other figure says what it rests on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Alternative",
    "Basis",
    "DeviceExplanation",
    "ExplanationRecord",
    "Held",
    "History",
    "LargeBlock",
    "Moment",
    "Place",
    "Replay",
    "Reserve",
    "Shortage",
]

Moment = Literal["peak", "end"]

Basis = Literal["stack", "stack and lifetime", "lifetime", "annotation", "profiler", "nothing"]
"""What a category is known by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One category of what was allocated.

    Attributes:
        category: what the blocks were for.
        basis: what that is known by; "nothing" for those that are unknown.
        size_bytes: as requested, without rounding.
        blocks: how many there were.
    """

    category: str
    basis: Basis
    size_bytes: int
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What one line of the user's code held.

    Attributes:
        where: the innermost line outside of PyTorch and other installed packages, as
            `folder/file.py:12 function`; empty where no stack has one.
        operator: PyTorch's operator, node of the backward pass or own line; empty if not known.
        label: text that the user gave to the blocks, with `torch.cuda.memory`'s metadata.
        category: what the blocks were for.
        size_bytes: as requested, without rounding.
        blocks: how many there were.
    """

    where: str
    operator: str
    label: str
    category: str
    size_bytes: int
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeBlock:
    """A block that was alive at the explained moment, and how many others were like it.

    Alike are blocks of one requested size that were for the same, came from the same place, and
    are all from before the recording or all from within it. What may differ is the oldest one's.

    Attributes:
        blocks: how many there were, with this one.
        address, stream: of the block; 0 is the default stream.
        requested_bytes: what was asked for, by each of them.
        size_bytes: what the allocator gave.
        age_events: how many events before the moment it was allocated; None where it was there
            before the recording.
        category, basis, where, operator, label: as in `Held` and `Place`.
    """

    blocks: int
    address: int
    stream: int
    requested_bytes: int
    size_bytes: int
    age_events: int | None
    category: str
    basis: Basis
    where: str
    operator: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """How the reserved memory was used at one moment, in bytes.

    `reserved_bytes` is the sum of allocated, awaiting, split, whole and private.

    Attributes:
        reserved_bytes: in segments.
        allocated_bytes: in blocks in use, whole.
        awaiting_bytes: in blocks whose free waits for another stream.
        split_bytes: free, in segments that are partly in use: they cannot be given back.
        whole_bytes: free, in segments (or pages of expandable ones) that nothing uses.
        private_bytes: free, in private pools of CUDA graphs or `torch.cuda.MemPool`: while these
            live, it is not given back, and serves no request of others.
        largest_free_bytes: the largest free block outside of private pools.
        free_blocks: how many free blocks there were outside of private pools.
        rounding_bytes: of the allocated bytes, what nobody asked for.
    """

    reserved_bytes: int
    allocated_bytes: int
    awaiting_bytes: int
    split_bytes: int
    whole_bytes: int
    private_bytes: int
    largest_free_bytes: int
    free_blocks: int
    rounding_bytes: int

    @property
    def unused_bytes(self) -> int:
        """Reserved and not allocated."""
        return self.reserved_bytes - self.allocated_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """How far the simulated allocator agrees with the recording under the recorded settings.

    Attributes:
        requests: allocations that were replayed, one after the other from the recorded state.
        requests_matched: those that got the recorded block.
        ties: of those, how many the recording decides between free blocks of one size, of which
            PyTorch's versions take different ones.
        recorded_reserved_bytes: most bytes in segments, as recorded.
        replayed_reserved_bytes: the same where the simulation runs from the first event to the
            last without being told what was recorded.
        first_difference: where the two part, in words; None where they do not.
    """

    requests: int
    requests_matched: int
    ties: int
    recorded_reserved_bytes: int
    replayed_reserved_bytes: int
    first_difference: str | None

    @property
    def exact(self) -> bool:
        """Whether every choice and the reserve are the recorded ones."""
        return (
            self.requests == self.requests_matched
            and self.recorded_reserved_bytes == self.replayed_reserved_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """What the recorded requests reserve under some settings, simulated from an empty cache.

    Attributes:
        settings: the text of PYTORCH_CUDA_ALLOC_CONF; empty for PyTorch's defaults.
        recorded: whether these are the settings of the recording.
        peak_reserved_bytes: most bytes in segments.
        peak_allocated_bytes: most bytes in blocks in use, which rounding can change.
        alloc_retries: how often everything cached had to be released, which stalls the GPU.
        failed: whether a request that was met in the recording finds no memory.
        meets_failed_request: whether the request that failed in the recording would have been met;
            None where none failed.
        note: why the figures may not hold; empty where they do.
    """

    settings: str
    recorded: bool
    peak_reserved_bytes: int
    peak_allocated_bytes: int
    alloc_retries: int
    failed: bool
    meets_failed_request: bool | None
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """The last request of a recording that failed.

    Attributes:
        requested_bytes: what was asked for, rounded as the allocator does.
        event: its index among the recorded events.
        events_after: how many events follow it.
        where, operator: as in `Place`.
        reserve: how the reserved memory was used then.
        device_free_bytes: what CUDA said was free; None where the recording does not tell.
        limit_bytes: the most that the process could have reserved then, as far as that is known.
        limited_by_process: whether CUDA had enough, so that the process had set itself a limit.
    """

    requested_bytes: int
    event: int
    events_after: int
    where: str
    operator: str
    reserve: Reserve
    device_free_bytes: int | None
    limit_bytes: int
    limited_by_process: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a recording shows over time; all columns are of one length.

    Attributes:
        events: after which recorded event each instant is, from 0.
        held_bytes: by category, as requested, the category that held most first.
        reserved_bytes: in segments.
    """

    events: tuple[int, ...]
    held_bytes: tuple[tuple[str, tuple[int, ...]], ...]
    reserved_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceExplanation:
    """What a snapshot shows of one device.

    Attributes:
        device: its index.
        settings: of the allocator, as the process had them; empty for PyTorch's defaults.
        moment: "peak" where events were recorded, else "end": the state that the snapshot shows.
        events: how many were recorded and placed.
        moment_event: index, from 0, of the first event after which most was allocated; None where
            that was before the first one, or at the end.
        moment_where: what that event allocated for: a line, an operator or both; else empty.
        reserve: how the reserved memory was used at that moment.
        peak_reserved_bytes: most bytes in segments during the recording.
        alloc_retries: requests for which the allocator had to release what it had cached.
        held: what was allocated at that moment, largest first.
        places: the same by line of code, largest first.
        largest: the largest blocks; those alike are one entry.
        replay: how the simulated allocator agrees with the recording; None without events.
        alternatives: what other settings would have reserved; empty without events.
        starts_empty: whether nothing was alive when the recording began.
        shortage: the request that failed; None where none did.
        history: what was held over the recording; None without events.
        notes: what the reader has to know about these figures.
    """

    device: int
    settings: str
    moment: Moment
    events: int
    moment_event: int | None
    moment_where: str
    reserve: Reserve
    peak_reserved_bytes: int
    alloc_retries: int
    held: tuple[Held, ...]
    places: tuple[Place, ...]
    largest: tuple[LargeBlock, ...]
    replay: Replay | None
    alternatives: tuple[Alternative, ...]
    starts_empty: bool
    shortage: Shortage | None
    history: History | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplanationRecord:
    """What a memory snapshot shows, by device.

    Attributes:
        source: the file, as it was named.
        devices: those of which the snapshot shows anything.
    """

    source: str
    devices: tuple[DeviceExplanation, ...]
