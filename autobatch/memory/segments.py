"""The segments of a caching allocator, and the blocks that tile them.

Invariant: the blocks of a segment tile it, no two neighbours are both free, reserved bytes are the
sum of the segments and allocated bytes the sum of the blocks in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Final

from autobatch.memory.blocks import BlockInfo, BlockState, SegmentInfo

__all__ = [
    "ALLOCATED",
    "AWAITING",
    "FREE",
    "UNLIMITED",
    "UNMAPPED",
    "Block",
    "Pool",
    "Segments",
    "by_address",
    "chain",
]

FREE, ALLOCATED, AWAITING, UNMAPPED = range(4)
_STATES: Final[tuple[BlockState, ...]] = ("free", "allocated", "awaiting_free")

UNLIMITED: Final = 1 << 62
_FIRST_ADDRESS: Final = 1 << 40


class Pool:
    """Free blocks of one stream, size class and owner: what a request may choose from.

    `free` is sorted by size, then by address: the best fit comes first, and ties go to the lowest
    address.
    """

    __slots__ = ("free", "pool_id", "small", "stream", "unmapped")

    def __init__(self, small: bool, stream: int, pool_id: tuple[int, int]) -> None:
        self.small = small
        self.stream = stream
        self.pool_id = pool_id
        self.free: list[Block] = []
        self.unmapped: list[Block] = []

    def place(self, size_bytes: int, address: int) -> int:
        """Return the index in `free` of the first block that is not below a size and address."""
        free = self.free
        low, high = 0, len(free)
        while low < high:
            middle = (low + high) // 2
            block = free[middle]
            if block.size_bytes < size_bytes or (
                block.size_bytes == size_bytes and block.address < address
            ):
                low = middle + 1
            else:
                high = middle
        return low

    def add(self, block: Block) -> None:
        """Add a free block."""
        self.free.insert(self.place(block.size_bytes, block.address), block)

    def remove(self, block: Block) -> None:
        """Remove a free block, which has the size that it was added with."""
        del self.free[self.place(block.size_bytes, block.address)]


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

    def __init__(self, address: int, size_bytes: int, pool: Pool, base: int | None) -> None:
        """Create a free block without neighbours that is in no pool."""
        self.address = address
        self.size_bytes = size_bytes
        self.pool = pool
        self.base = base  # where its expandable segment begins; None in ordinary segments
        self.state = FREE
        self.requested_bytes = 0
        self.searches = 0
        self.shared = False
        self.prev: Block | None = None
        self.next: Block | None = None

    @property
    def awaits(self) -> bool:
        """Whether its free was requested and waits for other streams."""
        return self.state == AWAITING


by_address = attrgetter("address")


class Segments:
    """Blocks of one device, which of them are free, and the driver that gives memory for them."""

    def __init__(self, capacity_bytes: int | None) -> None:
        """Start empty; the driver can give `capacity_bytes`, or any number if None."""
        self.allocated_bytes = 0
        self.awaiting_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self._capacity = UNLIMITED if capacity_bytes is None else capacity_bytes
        self._next_address = _FIRST_ADDRESS
        self._searches = 0  # for blocks, by which garbage collection tells their age
        self._pools: dict[tuple[bool, int, tuple[int, int]], Pool] = {}
        self._blocks: dict[int, Block] = {}  # every mapped block, by address
        self._heads: dict[int, Block] = {}  # first block of every segment
        self._awaiting: dict[Block, None] = {}

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
            for block in chain(head):
                if block.state != UNMAPPED:
                    run.append(block)
                if run and (block.state == UNMAPPED or block.next is None):
                    found.append(_segment_info(run))
                    run = []
        return tuple(sorted(found, key=by_address))

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

    def _pool(self, small: bool, stream: int, pool_id: tuple[int, int]) -> Pool:
        key = (small, stream, pool_id)
        if key not in self._pools:
            self._pools[key] = Pool(small, stream, pool_id)
        return self._pools[key]

    def _count_reserved(self, new_bytes: int) -> None:
        self.reserved_bytes += new_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _recycle(self, block: Block) -> Block:
        """Make a block free, merge it with its free neighbours, and cache and return the result."""
        pool = block.pool
        after = block.next
        if after and after.state == FREE:
            pool.remove(after)
            self._absorb(block, after)
        before = block.prev
        if before and before.state == FREE:
            pool.remove(before)
            self._absorb(before, block)
            block = before
        block.state = FREE
        block.requested_bytes = 0
        block.searches = self._searches
        pool.add(block)
        return block

    def _absorb(self, block: Block, after: Block) -> None:
        """Merge a block with the one that follows it; the first keeps its identity."""
        if after.state != UNMAPPED:
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
        if block.state != UNMAPPED:
            self._blocks[rest.address] = rest
        return rest

    def _add_block(
        self, info: BlockInfo, pool: Pool, base: int | None, *, after: Block | None
    ) -> Block:
        """Append a block that exists already."""
        block = self._append(Block(info.address, info.size_bytes, pool, base), after)
        self._blocks[info.address] = block
        block.requested_bytes = info.requested_bytes
        block.state = _STATES.index(info.state)
        if block.state == FREE:
            pool.add(block)
        elif block.state == ALLOCATED:
            self.allocated_bytes += block.size_bytes
        else:
            self.awaiting_bytes += block.size_bytes
            self._awaiting[block] = None
        return block

    def _append(self, block: Block, after: Block | None) -> Block:
        """Link a block behind another, or let it begin a segment."""
        block.prev = after
        if after:
            after.next = block
        else:
            self._heads[block.address] = block
        return block


def chain(block: Block | None) -> Iterator[Block]:
    """Yield a block and all that follow it in its segment."""
    while block:
        yield block
        block = block.next


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
