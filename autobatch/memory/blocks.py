"""Blocks and segments of the caching allocator, as a snapshot shows them, and their sizes.

The constants are those of `c10/core/AllocatorConfig.h`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from autobatch.memory.allocator_settings import LARGE_SEGMENT_BYTES
from autobatch.support.units import MIB

__all__ = [
    "DEFAULT_POOL",
    "MIN_BLOCK_BYTES",
    "SMALL_BYTES",
    "SMALL_SEGMENT_BYTES",
    "BlockInfo",
    "BlockState",
    "SegmentInfo",
    "round_size",
    "segment_size",
]

MIN_BLOCK_BYTES: Final = 512
SMALL_BYTES: Final = MIB
SMALL_SEGMENT_BYTES: Final = 2 * MIB
_MIN_LARGE_BYTES: Final = 10 * MIB

DEFAULT_POOL: Final = (0, 0)

BlockState = Literal["free", "allocated", "awaiting_free"]


def round_size(size_bytes: int, divisions: int = 0) -> int:
    """Return the bytes that the allocator looks for when `size_bytes` are requested.

    A multiple of 512 B; with `divisions` above 1, the next of that many equal steps between two
    powers of two, for requests larger than 512 B times `divisions`.

    >>> round_size(1), round_size(513), round_size(1_200_000, divisions=4)
    (512, 1024, 1310720)
    """
    if divisions > 1 and size_bytes > MIN_BLOCK_BYTES * divisions:
        step = (1 << (size_bytes.bit_length() - 1)) // divisions
        return -(-size_bytes // step) * step
    return max(-(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES, MIN_BLOCK_BYTES)


def segment_size(rounded_bytes: int, large_segment_bytes: int = LARGE_SEGMENT_BYTES) -> int:
    """Return the size of the segment that is made for a request already rounded.

    >>> [segment_size(n * MIB) // MIB for n in (1, 2, 11)]
    [2, 20, 12]
    """
    if rounded_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if rounded_bytes < _MIN_LARGE_BYTES:
        return large_segment_bytes
    return -(-rounded_bytes // (2 * MIB)) * 2 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInfo:
    """One block as a snapshot shows it; `requested_bytes` is 0 for a free block."""

    address: int
    size_bytes: int
    requested_bytes: int
    state: BlockState


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentInfo:
    """One segment as a snapshot shows it; of an expandable one, a contiguous mapped range.

    Attributes:
        small: whether it serves requests of at most 1 MiB.
        pool_id: (0, 0), or the private pool (CUDA graphs, `torch.cuda.MemPool`) that owns it.
        blocks: all of its blocks, in order of address, without gaps.
        reserved_from: address from which pages of its expandable segment are known to have been
            mapped; None where nothing below this range was. Snapshots do not show it.
    """

    address: int
    size_bytes: int
    stream: int
    small: bool
    pool_id: tuple[int, int]
    expandable: bool
    blocks: tuple[BlockInfo, ...]
    reserved_from: int | None = None
