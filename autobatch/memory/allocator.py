"""The CUDA caching allocator of PyTorch in plain integers: which block serves which request.

Invariant: a request gets the best fit that the settings allow; what is cached is released only
where the driver has no memory left, or where the settings say so.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp` and `c10/core/AllocatorConfig.cpp`,
step-checked against recordings by `python -m reports.allocator`. Only the driver is idealised:
`cudaMalloc` gives ever higher addresses and succeeds as long as the capacity is not used up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.blocks import (
    DEFAULT_POOL,
    MIN_BLOCK_BYTES,
    SMALL_BYTES,
    SegmentInfo,
    round_size,
    segment_size,
)
from autobatch.memory.expandable import ExpandableSegments
from autobatch.memory.segments import (
    ALLOCATED,
    AWAITING,
    FREE,
    UNLIMITED,
    UNMAPPED,
    Block,
    Pool,
    by_address,
)
from autobatch.support.units import format_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CachingAllocator", "OutOfMemory"]


class OutOfMemory(Exception):
    """The answer to a request, as rounded, that cannot be met; never leaves autobatch."""

    def __init__(
        self, requested_bytes: int, allocated_bytes: int, reserved_bytes: int, limit_bytes: int
    ) -> None:
        super().__init__(
            f"out of memory: {format_bytes(requested_bytes)} requested,"
            f" {format_bytes(allocated_bytes)} allocated, {format_bytes(reserved_bytes)} reserved"
            f" of at most {format_bytes(limit_bytes)}"
        )


class CachingAllocator(ExpandableSegments):
    """PyTorch's caching allocator on one device.

    Attributes:
        allocated_bytes: blocks in use, whole; drops when a free is requested.
        awaiting_bytes: blocks whose free waits for work on other streams.
        reserved_bytes: all segments.
        alloc_retries: how often everything cached was released to satisfy a request.
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        *,
        capacity_bytes: int | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        """Start empty.

        Args:
            settings: PyTorch's defaults if None.
            capacity_bytes: what `cudaMalloc` can give in all; unlimited if None.
            limit_bytes: the per-process limit, checked before `cudaMalloc` is called.
        """
        settings = settings or AllocatorSettings()
        super().__init__(settings, capacity_bytes)
        self.alloc_retries = 0
        self._limit = UNLIMITED if limit_bytes is None else limit_bytes
        self._oversize = settings.max_split_size_bytes or UNLIMITED
        self._expandable = settings.expandable_segments
        self._collects = limit_bytes is not None and settings.garbage_collection_threshold > 0
        self._selective = (
            self._collects or self._expandable or settings.max_split_size_bytes is not None
        )
        self._rounded: dict[int, int] = {}

    @classmethod
    def from_segments(
        cls,
        segments: Iterable[SegmentInfo],
        settings: AllocatorSettings | None = None,
        *,
        capacity_bytes: int | None = None,
    ) -> Self:
        """Start with segments and blocks that exist already; peaks start at the present values."""
        self = cls(settings, capacity_bytes=capacity_bytes)
        segments = sorted(segments, key=by_address)
        self._take_over(segments)
        self._selective |= any(segment.expandable for segment in segments)
        return self

    def malloc(
        self, size_bytes: int, stream: int = 0, pool_id: tuple[int, int] = DEFAULT_POOL
    ) -> Block:
        """Allocate `size_bytes` (above 0) and return the block that serves them.

        Raises:
            OutOfMemory: not even after everything cached was released.
        """
        size = self._rounded.get(size_bytes) or self._round(size_bytes)
        small = size <= SMALL_BYTES
        pool = self._pools.get((small, stream, pool_id)) or self._pool(small, stream, pool_id)
        index = pool.place(size, 0)
        if self._selective:
            index = self._select(pool, size, index)
        block = pool.free.pop(index) if index < len(pool.free) else self._grow(pool, size)
        if small or self._expandable:
            splits = block.size_bytes - size >= MIN_BLOCK_BYTES
        else:
            splits = block.size_bytes - size > SMALL_BYTES and size < self._oversize
        if splits:
            pool.add(self._split(block, size))
        block.state = ALLOCATED
        block.requested_bytes = size_bytes
        allocated = self.allocated_bytes = self.allocated_bytes + block.size_bytes
        if allocated > self.peak_allocated_bytes:
            self.peak_allocated_bytes = allocated
        return block

    def free(self, block: Block) -> None:
        """Free a block; one that other streams used waits for `complete_free` or `synchronize`.

        Raises:
            ValueError: the block is not allocated.
        """
        if block.shared:
            self.request_free(block)
            return
        if block.state != ALLOCATED:
            raise ValueError(f"block at {block.address:#x} is not allocated: it was freed before")
        self.allocated_bytes -= block.size_bytes
        self._recycle(block)

    def run(
        self,
        sizes: Sequence[int],
        events: Sequence[int],
        streams: Sequence[int] | None = None,
        timeline: list[tuple[int, int]] | None = None,
    ) -> tuple[int, int, int | None]:
        """Allocate and free the blocks of a trace, up to the first request that cannot be met.

        Args:
            sizes: requested bytes of each block; one of 0 takes no memory.
            events: `b` allocates block `b`, `~b` frees it.
            streams: stream of each block; all on one if None.
            timeline: allocated and reserved bytes after each event are appended to it.

        Returns:
            The most bytes allocated, the first event after which they were, and the event that
            could not be satisfied, if any.
        """
        live: list[Block | None] = [None] * len(sizes)
        peak = self.allocated_bytes
        peak_event = 0
        for event, index in enumerate(events):
            if index >= 0:
                if sizes[index]:
                    try:
                        block = self.malloc(sizes[index], streams[index] if streams else 0)
                    except OutOfMemory:
                        return peak, peak_event, event
                    live[index] = block
                    if self.allocated_bytes > peak:
                        peak = self.allocated_bytes
                        peak_event = event
            else:
                freed = live[~index]
                if freed:
                    self.free(freed)
            if timeline is not None:
                timeline.append((self.allocated_bytes, self.reserved_bytes))
        return peak, peak_event, None

    def record_stream(self, block: Block, stream: int) -> None:
        """Note that another stream uses the block, so that its free has to wait."""
        block.shared |= stream != block.pool.stream

    def request_free(self, block: Block) -> None:
        """Begin a free that waits for other streams: no longer allocated, still active."""
        if block.state != ALLOCATED:
            raise ValueError(f"block at {block.address:#x} is not allocated: it was freed before")
        self.allocated_bytes -= block.size_bytes
        self.awaiting_bytes += block.size_bytes
        block.state = AWAITING
        self._awaiting[block] = None

    def complete_free(self, block: Block) -> None:
        """End a requested free: the other streams are done with the block."""
        if block.state != AWAITING:
            raise ValueError(f"block at {block.address:#x} has no free that waits")
        self.awaiting_bytes -= block.size_bytes
        del self._awaiting[block]
        block.shared = False
        self._recycle(block)

    def synchronize(self) -> None:
        """Complete every requested free."""
        for block in list(self._awaiting):
            self.complete_free(block)

    def empty_cache(self) -> None:
        """Release every wholly free segment, and every wholly free page of expandable ones."""
        self.synchronize()
        for pool in sorted(self._pools.values(), key=lambda pool: (pool.small, pool.stream)):
            if pool.pool_id == DEFAULT_POOL:
                for block in list(pool.free):
                    if block.base is not None or block.prev is block.next is None:
                        self.release(block)

    def release(self, block: Block) -> tuple[int, int]:
        """Give a free block back to the driver; of an expandable segment, its whole pages.

        Returns:
            Address and bytes of what was released.

        Raises:
            ValueError: the block is in use or only part of a segment.
        """
        if block.state != FREE:
            raise ValueError(f"block at {block.address:#x} is not free")
        if block.base is not None:
            return self._unmap(block, block.base)
        if block.prev or block.next:
            raise ValueError(f"block at {block.address:#x} is only part of its segment")
        block.pool.remove(block)
        del self._blocks[block.address], self._heads[block.address]
        self.reserved_bytes -= block.size_bytes
        return block.address, block.size_bytes

    def _round(self, size_bytes: int) -> int:
        size = round_size(size_bytes, self.settings.divisions(size_bytes))
        if size >= UNLIMITED:  # beyond what the compiled fields hold
            raise self._out_of_memory(size)
        self._rounded[size_bytes] = size
        return size

    def _select(self, pool: Pool, size: int, index: int) -> int:
        """Apply the settings to the best fit `pool.free[index]`; return the index of the choice.

        An expandable block counts with the unmapped room behind it, so a larger block may fit
        better; an oversize block serves only oversize requests that are not much smaller. Where
        nothing may be chosen, the index is `len(pool.free)`.
        """
        if self._collects and not pool.small and pool.pool_id == DEFAULT_POOL:
            self._searches += 1
        free, count = pool.free, len(pool.free)
        if not self._expandable:
            while index < count and free[index].base is not None:
                index += 1
        else:
            while index + 1 < count:
                block = free[index]
                if block.base is None or _room(free[index + 1]) >= _room(block):
                    break
                index += 1
        if index < count:
            found = free[index].size_bytes
            slack = self.settings.max_non_split_rounding_bytes
            if found >= self._oversize and (size < self._oversize or found >= size + slack):
                return count
        return index

    def _grow(self, pool: Pool, size: int) -> Block:
        """Return a new free block that is in no pool, after releasing what must be released."""
        if self._collects:
            self._collect_garbage()
        block = self._new_block(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._new_block(pool, size)
        if block is None:
            self.empty_cache()
            self.alloc_retries += 1
            block = self._new_block(pool, size)
        if block is None:
            raise self._out_of_memory(size)
        return block

    def _out_of_memory(self, size: int) -> OutOfMemory:
        limit = min(self._limit, self._capacity)
        return OutOfMemory(size, self.allocated_bytes, self.reserved_bytes, limit)

    def _new_block(self, pool: Pool, size: int) -> Block | None:
        new_bytes = segment_size(size, self.settings.large_segment_bytes)
        if self.reserved_bytes + new_bytes > self._limit:
            return None
        if self._expandable:
            return self._extend(pool, size)
        address = self.cuda_malloc(new_bytes)
        if address is None:
            return None
        block = Block(address, new_bytes, pool, None)
        self._blocks[address] = self._heads[address] = block
        self._count_reserved(new_bytes)
        return block

    def _collect_garbage(self) -> None:
        """Release unsplit large blocks of at least average age, in searches since their free."""
        threshold = int(self.settings.garbage_collection_threshold * self._limit)
        target = self.reserved_bytes - threshold
        ages = {
            block: self._searches - block.searches
            for pool in self._pools.values()
            if pool.pool_id == DEFAULT_POOL and not pool.small
            for block in pool.free
            if block.base is None and block.prev is block.next is None
        }
        while target > 0 and ages:
            average = sum(ages.values()) / len(ages)
            for block in [block for block, age in ages.items() if age >= average]:
                del ages[block]
                target -= self.release(block)[1]

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Release one cached oversize block as large as the request, or the largest ones."""
        if self._oversize == UNLIMITED:
            return False
        needed = max(size, self._oversize)
        first = pool.place(self._oversize, 0)
        blocks = [block for block in pool.free[first:] if block.base is None]
        enough = next((block for block in blocks if block.size_bytes >= needed), None)
        if enough:
            self.release(enough)
            return True
        while blocks and needed > 0:
            needed -= self.release(blocks.pop())[1]
        return needed <= 0


def _room(block: Block) -> int:
    """Return the size to which a free block of an expandable segment can grow in place."""
    after = block.next
    return block.size_bytes + (after.size_bytes if after and after.state == UNMAPPED else 0)
