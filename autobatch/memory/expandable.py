"""Expandable segments: a range of addresses, of which pages are backed as they are needed.

Invariant: what no memory backs is unmapped blocks, which `Pool.unmapped` holds by address; no two
neighbours are both unmapped.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.blocks import SMALL_SEGMENT_BYTES, SegmentInfo
from autobatch.memory.segments import (
    FREE,
    UNLIMITED,
    UNMAPPED,
    Block,
    Pool,
    Segments,
    by_address,
    chain,
)

__all__ = ["ExpandableSegments"]

_UNBOUNDED_RESERVE = 1 << 42


class ExpandableSegments(Segments):
    """Segments, some of which can grow.

    Attributes:
        settings: of the allocator; they say how large pages are.
    """

    def __init__(self, settings: AllocatorSettings, capacity_bytes: int | None) -> None:
        """Start empty."""
        super().__init__(capacity_bytes)
        self.settings = settings

    def _take_over(self, segments: Sequence[SegmentInfo]) -> None:
        """Begin with segments and blocks that exist already, by address."""
        tails: dict[Pool, Block] = {}
        for segment in segments:
            pool = self._pool(segment.small, segment.stream, segment.pool_id)
            tail = tails.get(pool) if segment.expandable else None
            base: int | None = None
            if segment.expandable:
                base = start = segment.reserved_from or segment.address
                if tail:
                    base, start = tail.base, tail.address + tail.size_bytes
                if start < segment.address:
                    tail = self._add_unmapped(start, segment.address, pool, base, after=tail)
            for info in segment.blocks:
                tail = self._add_block(info, pool, base, after=tail)
            if segment.expandable and tail:
                tails[pool] = tail
            self.reserved_bytes += segment.size_bytes
            self._next_address = max(self._next_address, segment.address + segment.size_bytes)
        for pool, tail in tails.items():
            assert tail.base is not None  # only expandable segments are in `tails`
            start, end = tail.address + tail.size_bytes, tail.base + self._reserve_size(pool)
            # Its addresses end where those of another segment begin, whatever the capacity was.
            taken = [part.reserved_from or part.address for part in segments]
            end = min([end] + [address for address in taken if address >= start])
            self._next_address = max(self._next_address, end)
            if start < end:
                self._add_unmapped(start, end, pool, tail.base, after=tail)
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def _page_size(self, pool: Pool) -> int:
        return SMALL_SEGMENT_BYTES if pool.small else self.settings.large_segment_bytes

    def _reserve_size(self, pool: Pool) -> int:
        """Return the address range of an expandable segment: 9/8 of the capacity, in pages."""
        page = self._page_size(pool)
        bounded = self._capacity < UNLIMITED
        return -(-(self._capacity * 9 // 8 if bounded else _UNBOUNDED_RESERVE) // page) * page

    def _extend(self, pool: Pool, size: int) -> Block | None:
        """Map pages at the lowest address with room for `size`, joined to the free block before."""
        block: Block | None = self._unmapped_room(pool, size)
        if block and block.state == UNMAPPED:
            block = self._map(block, min(block.size_bytes, size))
        while block and block.size_bytes < size:
            assert block.next is not None  # _unmapped_room counted it
            block = self._map(block.next, min(block.next.size_bytes, size - block.size_bytes))
        if block:
            pool.remove(block)
        return block

    def _unmapped_room(self, pool: Pool, size: int) -> Block:
        for block in pool.unmapped:
            first = block.prev if block.prev and block.prev.state == FREE else block
            room = 0
            for following in chain(first):
                if following.state not in (FREE, UNMAPPED):
                    break
                room += following.size_bytes
            if room >= size:
                return first
        reserve = self._reserve_size(pool)
        base = self.cuda_reserve(reserve)
        return self._add_unmapped(base, base + reserve, pool, base, after=None)

    def _map(self, block: Block, size: int) -> Block | None:
        """Back the first pages of an unmapped block; return the free block they end up in."""
        pool = block.pool
        page = self._page_size(pool)
        mapped = -(-size // page) * page
        if not self.cuda_map(block.address, mapped):
            return None
        pool.unmapped.remove(block)
        if mapped < block.size_bytes:
            insort(pool.unmapped, self._split(block, mapped), key=by_address)
        block.state = FREE
        self._blocks[block.address] = block
        self._count_reserved(mapped)
        return self._recycle(block)

    def _unmap(self, block: Block, base: int) -> tuple[int, int]:
        """Unmap the whole pages inside a free block of an expandable segment."""
        pool = block.pool
        page = self._page_size(pool)
        first = base + -(-(block.address - base) // page) * page
        end = block.address + block.size_bytes
        last = base + (end - base) // page * page
        if first >= last:
            return first, 0
        pool.remove(block)
        if last < end:
            pool.add(self._split(block, last - block.address))
        if block.address < first:
            rest = self._split(block, first - block.address)
            pool.add(block)
            block = rest
        del self._blocks[block.address]
        block.state = UNMAPPED
        self.reserved_bytes -= last - first
        if block.next and block.next.state == UNMAPPED:
            pool.unmapped.remove(block.next)
            self._absorb(block, block.next)
        if block.prev and block.prev.state == UNMAPPED:
            self._absorb(block.prev, block)
        else:
            insort(pool.unmapped, block, key=by_address)
        if self._heads[base].next is None and self._heads[base].state == UNMAPPED:
            pool.unmapped.remove(self._heads.pop(base))
        return first, last - first

    def _add_unmapped(
        self, start: int, end: int, pool: Pool, base: int | None, *, after: Block | None
    ) -> Block:
        """Append an address range that is reserved and that no memory backs."""
        block = self._append(Block(start, end - start, pool, base), after)
        block.state = UNMAPPED
        insort(pool.unmapped, block, key=by_address)
        return block
