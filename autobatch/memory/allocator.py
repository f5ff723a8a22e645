"""The CUDA caching allocator of PyTorch in plain integers: which block serves which request.

Invariant: the blocks of a segment tile it, no two neighbours are both free, reserved bytes are the
sum of the segments and allocated bytes the sum of the blocks in use.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp` and `c10/core/AllocatorConfig.cpp`,
step-checked against recordings by `python -m reports.allocator`. Only the driver is idealised:
`cudaMalloc` gives ever higher addresses and succeeds as long as the capacity is not used up.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.blocks import (
    DEFAULT_POOL,
    MIN_BLOCK_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
    BlockInfo,
    BlockState,
    SegmentInfo,
    round_size,
    segment_size,
)
from autobatch.support.units import format_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ADDRESS_BITS", "Block", "CachingAllocator", "OutOfMemory"]

_STATES: Final[tuple[BlockState, ...]] = ("free", "allocated", "awaiting_free")
_FREE, _ALLOCATED, _AWAITING, _UNMAPPED = range(4)

_UNLIMITED: Final = 1 << 62
_UNBOUNDED_RESERVE: Final = 1 << 42
_FIRST_ADDRESS: Final = 1 << 40
ADDRESS_BITS: Final = 64
_ADDRESS_MASK: Final = (1 << ADDRESS_BITS) - 1


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


class _Pool:
    """Free blocks of one stream, size class and owner: what a request may choose from.

    `keys` holds `size << 64 | address` of every free block, sorted: the best fit comes first, and
    ties go to the lowest address.
    """

    __slots__ = ("keys", "pool_id", "small", "stream", "unmapped")

    def __init__(self, small: bool, stream: int, pool_id: tuple[int, int]) -> None:
        self.small = small
        self.stream = stream
        self.pool_id = pool_id
        self.keys: list[int] = []
        self.unmapped: list[Block] = []


class Block:
    """A contiguous part of a segment; the handle that `malloc` returns and `free` takes."""

    __slots__ = (
        "address",
        "base",
        "next",
        "pool",
        "prev",
        "requested_bytes",
        "searches",
        "shared",
        "size_bytes",
        "state",
    )

    def __init__(self, address: int, size_bytes: int, pool: _Pool, base: int | None) -> None:
        """Create a free block without neighbours that is in no pool."""
        self.address = address
        self.size_bytes = size_bytes
        self.pool = pool
        self.base = base  # where its expandable segment begins; None in ordinary segments
        self.state = _FREE
        self.requested_bytes = 0
        self.searches = 0
        self.shared = False
        self.prev: Block | None = None
        self.next: Block | None = None

    @property
    def awaits(self) -> bool:
        """Whether its free was requested and waits for other streams."""
        return self.state == _AWAITING


_by_address = attrgetter("address")


class CachingAllocator:
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
        self.settings = settings
        self.allocated_bytes = 0
        self.awaiting_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self.alloc_retries = 0
        self._capacity = _UNLIMITED if capacity_bytes is None else capacity_bytes
        self._limit = _UNLIMITED if limit_bytes is None else limit_bytes
        self._oversize = settings.max_split_size_bytes or _UNLIMITED
        self._expandable = settings.expandable_segments
        self._collects = limit_bytes is not None and settings.garbage_collection_threshold > 0
        self._selective = (
            self._collects or self._expandable or settings.max_split_size_bytes is not None
        )
        self._searches = 0
        self._rounded: dict[int, int] = {}
        self._pools: dict[tuple[bool, int, tuple[int, int]], _Pool] = {}
        self._blocks: dict[int, Block] = {}  # every mapped block, by address
        self._heads: dict[int, Block] = {}  # first block of every segment
        self._awaiting: dict[Block, None] = {}
        self._next_address = _FIRST_ADDRESS

    @classmethod
    def from_segments(
        cls,
        segments: Iterable[SegmentInfo],
        settings: AllocatorSettings | None = None,
        *,
        capacity_bytes: int | None = None,
        limit_bytes: int | None = None,
    ) -> Self:
        """Start with segments and blocks that exist already; peaks start at the present values."""
        self = cls(settings, capacity_bytes=capacity_bytes, limit_bytes=limit_bytes)
        segments = sorted(segments, key=_by_address)
        tails: dict[_Pool, Block] = {}
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
            self._selective |= segment.expandable
            self.reserved_bytes += segment.size_bytes
            self._next_address = max(self._next_address, segment.address + segment.size_bytes)
        for pool, tail in tails.items():
            assert tail.base is not None  # only expandable segments are in `tails`
            start, end = tail.address + tail.size_bytes, tail.base + self._reserve_size(pool)
            # Its addresses end where those of another segment begin, whatever the capacity was.
            taken = [part.reserved_from or part.address for part in segments]
            end = min([end, *(address for address in taken if address >= start)])
            self._next_address = max(self._next_address, end)
            if start < end:
                self._add_unmapped(start, end, pool, tail.base, after=tail)
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes
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
        keys = pool.keys
        index = bisect_left(keys, size << ADDRESS_BITS)
        if self._selective:
            index = self._select(pool, size, index)
        if index < len(keys):
            block = self._blocks[keys.pop(index) & _ADDRESS_MASK]
        else:
            block = self._grow(pool, size)
        if small or self._expandable:
            splits = block.size_bytes - size >= MIN_BLOCK_BYTES
        else:
            splits = block.size_bytes - size > SMALL_BYTES and size < self._oversize
        if splits:
            rest = self._split(block, size)
            insort(keys, rest.size_bytes << ADDRESS_BITS | rest.address)
        block.state = _ALLOCATED
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
        if block.state != _ALLOCATED:
            raise ValueError(f"block at {block.address:#x} is not allocated: it was freed before")
        self.allocated_bytes -= block.size_bytes
        self._recycle(block)

    def record_stream(self, block: Block, stream: int) -> None:
        """Note that another stream uses the block, so that its free has to wait."""
        block.shared |= stream != block.pool.stream

    def request_free(self, block: Block) -> None:
        """Begin a free that waits for other streams: no longer allocated, still active."""
        if block.state != _ALLOCATED:
            raise ValueError(f"block at {block.address:#x} is not allocated: it was freed before")
        self.allocated_bytes -= block.size_bytes
        self.awaiting_bytes += block.size_bytes
        block.state = _AWAITING
        self._awaiting[block] = None

    def complete_free(self, block: Block) -> None:
        """End a requested free: the other streams are done with the block."""
        if block.state != _AWAITING:
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
                for block in [self._blocks[key & _ADDRESS_MASK] for key in pool.keys]:
                    if block.base is not None or block.prev is block.next is None:
                        self.release(block)

    def release(self, block: Block) -> tuple[int, int]:
        """Give a free block back to the driver; of an expandable segment, its whole pages.

        Returns:
            Address and bytes of what was released.

        Raises:
            ValueError: the block is in use or only part of a segment.
        """
        if block.state != _FREE:
            raise ValueError(f"block at {block.address:#x} is not free")
        if block.base is not None:
            return self._unmap(block, block.base)
        if block.prev or block.next:
            raise ValueError(f"block at {block.address:#x} is only part of its segment")
        self._uncache(block)
        del self._blocks[block.address], self._heads[block.address]
        self.reserved_bytes -= block.size_bytes
        return block.address, block.size_bytes

    def block_at(self, address: int) -> Block | None:
        """Return the block that begins at an address, else the one that holds it, else None."""
        return self._blocks.get(address) or next(
            (
                block
                for block in self._blocks.values()
                if block.address < address < block.address + block.size_bytes
            ),
            None,
        )

    def segments(self) -> tuple[SegmentInfo, ...]:
        """Return every segment with its blocks, by address, as a snapshot would show them."""
        found = []
        for head in self._heads.values():
            run: list[Block] = []
            for block in _chain(head):
                if block.state != _UNMAPPED:
                    run.append(block)
                if run and (block.state == _UNMAPPED or block.next is None):
                    found.append(_segment_info(run))
                    run = []
        return tuple(sorted(found, key=_by_address))

    def cuda_malloc(self, size_bytes: int) -> int | None:
        """Answer for `cudaMalloc`: an address, or None when the capacity is used up."""
        if self.reserved_bytes + size_bytes > self._capacity:
            return None
        return self.cuda_reserve(size_bytes)

    def cuda_reserve(self, size_bytes: int) -> int:
        """Answer for `cuMemAddressReserve`: the address of a range that no memory backs yet."""
        address = self._next_address
        self._next_address += size_bytes
        return address

    def cuda_map(self, address: int, size_bytes: int) -> bool:
        """Answer for `cuMemCreate` and `cuMemMap`: whether there is memory to back the range."""
        return self.reserved_bytes + size_bytes <= self._capacity

    def _round(self, size_bytes: int) -> int:
        size = round_size(size_bytes, self.settings.divisions(size_bytes))
        self._rounded[size_bytes] = size
        return size

    def _pool(self, small: bool, stream: int, pool_id: tuple[int, int]) -> _Pool:
        key = (small, stream, pool_id)
        if key not in self._pools:
            self._pools[key] = _Pool(small, stream, pool_id)
        return self._pools[key]

    def _select(self, pool: _Pool, size: int, index: int) -> int:
        """Apply the settings to the best fit `pool.keys[index]`; return the index of the choice.

        An expandable block counts with the unmapped room behind it, so a larger block may fit
        better; an oversize block serves only oversize requests that are not much smaller. Where
        nothing may be chosen, the index is `len(pool.keys)`.
        """
        if self._collects and not pool.small and pool.pool_id == DEFAULT_POOL:
            self._searches += 1
        count = len(pool.keys)
        if not self._expandable:
            while index < count and self._cached(pool, index).base is not None:
                index += 1
        else:
            while index + 1 < count:
                block = self._cached(pool, index)
                if block.base is None or _room(self._cached(pool, index + 1)) >= _room(block):
                    break
                index += 1
        if index < count:
            found = self._cached(pool, index).size_bytes
            slack = self.settings.max_non_split_rounding_bytes
            if found >= self._oversize and (size < self._oversize or found >= size + slack):
                return count
        return index

    def _cached(self, pool: _Pool, index: int) -> Block:
        return self._blocks[pool.keys[index] & _ADDRESS_MASK]

    def _grow(self, pool: _Pool, size: int) -> Block:
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
            limit = min(self._limit, self._capacity)
            raise OutOfMemory(size, self.allocated_bytes, self.reserved_bytes, limit)
        return block

    def _new_block(self, pool: _Pool, size: int) -> Block | None:
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

    def _count_reserved(self, new_bytes: int) -> None:
        self.reserved_bytes += new_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _collect_garbage(self) -> None:
        """Release unsplit large blocks of at least average age, in searches since their free."""
        threshold = int(self.settings.garbage_collection_threshold * self._limit)
        target = self.reserved_bytes - threshold
        ages = {
            block: self._searches - block.searches
            for block in self._free_blocks()
            if not block.pool.small and block.base is None and block.prev is block.next is None
        }
        while target > 0 and ages:
            average = sum(ages.values()) / len(ages)
            for block in [block for block, age in ages.items() if age >= average]:
                del ages[block]
                target -= self.release(block)[1]

    def _free_blocks(self) -> Iterator[Block]:
        for pool in self._pools.values():
            if pool.pool_id == DEFAULT_POOL:
                for key in pool.keys:
                    yield self._blocks[key & _ADDRESS_MASK]

    def _release_oversize(self, pool: _Pool, size: int) -> bool:
        """Release one cached oversize block as large as the request, or the largest ones."""
        if self._oversize == _UNLIMITED:
            return False
        needed = max(size, self._oversize)
        oversize = pool.keys[bisect_left(pool.keys, self._oversize << ADDRESS_BITS) :]
        blocks = [self._blocks[key & _ADDRESS_MASK] for key in oversize]
        blocks = [block for block in blocks if block.base is None]
        enough = next((block for block in blocks if block.size_bytes >= needed), None)
        if enough:
            self.release(enough)
            return True
        while blocks and needed > 0:
            needed -= self.release(blocks.pop())[1]
        return needed <= 0

    def _recycle(self, block: Block) -> Block:
        """Make a block free, merge it with its free neighbours, and cache and return the result."""
        keys = block.pool.keys
        after = block.next
        if after and after.state == _FREE:
            del keys[bisect_left(keys, after.size_bytes << ADDRESS_BITS | after.address)]
            self._absorb(block, after)
        before = block.prev
        if before and before.state == _FREE:
            del keys[bisect_left(keys, before.size_bytes << ADDRESS_BITS | before.address)]
            self._absorb(before, block)
            block = before
        block.state = _FREE
        block.requested_bytes = 0
        block.searches = self._searches
        insort(keys, block.size_bytes << ADDRESS_BITS | block.address)
        return block

    def _absorb(self, block: Block, after: Block) -> None:
        """Merge a block with the one that follows it; the first keeps its identity."""
        if after.state != _UNMAPPED:
            del self._blocks[after.address]
        block.size_bytes += after.size_bytes
        block.next = after.next
        if after.next:
            after.next.prev = block

    def _split(self, block: Block, size: int) -> Block:
        """Cut a block after `size` bytes and return the rest, which is in no pool yet."""
        rest = Block(block.address + size, block.size_bytes - size, block.pool, block.base)
        rest.prev = block
        rest.next = block.next
        if block.next:
            block.next.prev = rest
        block.next = rest
        block.size_bytes = size
        rest.state = block.state
        rest.searches = self._searches
        if block.state != _UNMAPPED:
            self._blocks[rest.address] = rest
        return rest

    def _uncache(self, block: Block) -> None:
        keys = block.pool.keys
        del keys[bisect_left(keys, block.size_bytes << ADDRESS_BITS | block.address)]

    def _page_size(self, pool: _Pool) -> int:
        return SMALL_SEGMENT_BYTES if pool.small else self.settings.large_segment_bytes

    def _reserve_size(self, pool: _Pool) -> int:
        """Return the address range of an expandable segment: 9/8 of the capacity, in pages."""
        page = self._page_size(pool)
        bounded = self._capacity < _UNLIMITED
        return -(-(self._capacity * 9 // 8 if bounded else _UNBOUNDED_RESERVE) // page) * page

    def _extend(self, pool: _Pool, size: int) -> Block | None:
        """Map pages at the lowest address with room for `size`, joined to the free block before."""
        block: Block | None = self._unmapped_room(pool, size)
        if block and block.state == _UNMAPPED:
            block = self._map(block, min(block.size_bytes, size))
        while block and block.size_bytes < size:
            assert block.next is not None  # _unmapped_room counted it
            block = self._map(block.next, min(block.next.size_bytes, size - block.size_bytes))
        if block:
            self._uncache(block)
        return block

    def _unmapped_room(self, pool: _Pool, size: int) -> Block:
        for block in pool.unmapped:
            first = block.prev if block.prev and block.prev.state == _FREE else block
            room = 0
            for following in _chain(first):
                if following.state not in (_FREE, _UNMAPPED):
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
            insort(pool.unmapped, self._split(block, mapped), key=_by_address)
        block.state = _FREE
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
        self._uncache(block)
        if last < end:
            rest = self._split(block, last - block.address)
            insort(pool.keys, rest.size_bytes << ADDRESS_BITS | rest.address)
        if block.address < first:
            rest = self._split(block, first - block.address)
            insort(pool.keys, block.size_bytes << ADDRESS_BITS | block.address)
            block = rest
        del self._blocks[block.address]
        block.state = _UNMAPPED
        self.reserved_bytes -= last - first
        if block.next and block.next.state == _UNMAPPED:
            pool.unmapped.remove(block.next)
            self._absorb(block, block.next)
        if block.prev and block.prev.state == _UNMAPPED:
            self._absorb(block.prev, block)
        else:
            insort(pool.unmapped, block, key=_by_address)
        if self._heads[base].next is None and self._heads[base].state == _UNMAPPED:
            pool.unmapped.remove(self._heads.pop(base))
        return first, last - first

    def _add_block(
        self, info: BlockInfo, pool: _Pool, base: int | None, *, after: Block | None
    ) -> Block:
        block = self._append(Block(info.address, info.size_bytes, pool, base), after)
        self._blocks[info.address] = block
        block.requested_bytes = info.requested_bytes
        block.state = _STATES.index(info.state)
        if block.state == _FREE:
            insort(pool.keys, block.size_bytes << ADDRESS_BITS | block.address)
        elif block.state == _ALLOCATED:
            self.allocated_bytes += block.size_bytes
        else:
            self.awaiting_bytes += block.size_bytes
            self._awaiting[block] = None
        return block

    def _add_unmapped(
        self, start: int, end: int, pool: _Pool, base: int | None, *, after: Block | None
    ) -> Block:
        """Append an address range that is reserved and that no memory backs."""
        block = self._append(Block(start, end - start, pool, base), after)
        block.state = _UNMAPPED
        insort(pool.unmapped, block, key=_by_address)
        return block

    def _append(self, block: Block, after: Block | None) -> Block:
        """Link a block behind another, or let it begin a segment."""
        block.prev = after
        if after:
            after.next = block
        else:
            self._heads[block.address] = block
        return block


def _chain(block: Block | None) -> Iterator[Block]:
    """Yield a block and all that follow it in its segment."""
    while block:
        yield block
        block = block.next


def _room(block: Block) -> int:
    """Return the size to which a free block of an expandable segment can grow in place."""
    after = block.next
    return block.size_bytes + (after.size_bytes if after and after.state == _UNMAPPED else 0)


def _segment_info(run: Sequence[Block]) -> SegmentInfo:
    pool = run[0].pool
    return SegmentInfo(
        address=run[0].address,
        size_bytes=sum(block.size_bytes for block in run),
        stream=pool.stream,
        small=pool.small,
        pool_id=pool.pool_id,
        expandable=run[0].base is not None,
        blocks=tuple(
            BlockInfo(
                address=block.address,
                size_bytes=block.size_bytes,
                requested_bytes=block.requested_bytes,
                state=_STATES[block.state],
            )
            for block in run
        ),
    )
