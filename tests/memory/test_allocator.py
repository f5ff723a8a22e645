"""The rules of the caching allocator, each with figures worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.errors import UsageError
from autobatch.memory.allocator import CachingAllocator, OutOfMemory
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.blocks import round_size, segment_size
from autobatch.memory.replay import simulate
from autobatch.memory.segments import Block
from autobatch.support.units import GIB, KIB, MIB


def reserved_by(settings: AllocatorSettings, *sizes: int) -> int:
    """Reserve with the given requests, one after the other, and return the bytes."""
    allocator = CachingAllocator(settings)
    for size in sizes:
        allocator.malloc(size)
    return allocator.reserved_bytes


@pytest.mark.parametrize(
    ("size", "rounded"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)]
)
def test_sizes_round_up_to_512_bytes(size: int, rounded: int) -> None:
    assert round_size(size) == rounded


def test_sizes_round_up_to_a_fraction_of_the_next_power_of_two() -> None:
    # 4 divisions between 1024 and 2048 KiB are 256 KiB apart
    assert round_size(1100 * KIB, divisions=4) == 1280 * KIB
    assert round_size(1536 * KIB, divisions=4) == 1536 * KIB
    # up to 512 B x 4 the plain rule holds
    assert round_size(1200, divisions=4) == 1536
    assert round_size(2048, divisions=4) == 2048
    assert round_size(2049, divisions=4) == 2560


@pytest.mark.parametrize(
    ("rounded", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (21 * MIB, 22 * MIB),
    ],
)
def test_a_new_segment_depends_on_the_size(rounded: int, segment: int) -> None:
    assert segment_size(rounded) == segment
    assert reserved_by(AllocatorSettings(), rounded) == segment


def test_small_and_large_requests_do_not_share_segments() -> None:
    allocator = CachingAllocator()
    allocator.malloc(MIB)
    allocator.malloc(MIB + 1)
    assert [part.small for part in allocator.segments()] == [True, False]
    assert allocator.reserved_bytes == 22 * MIB


def test_streams_and_private_pools_do_not_share_cached_blocks() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(512))
    allocator.malloc(512, stream=7)
    allocator.malloc(512, pool_id=(0, 1))
    assert allocator.reserved_bytes == 6 * MIB


def test_the_smallest_block_that_is_large_enough_is_chosen() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.malloc(size * MIB) for size in (40, 20, 30)]
    smallest_fit = blocks[2].address
    for block in blocks:
        allocator.free(block)
    assert allocator.malloc(22 * MIB).address == smallest_fit


def test_ties_go_to_the_lowest_address() -> None:
    allocator = CachingAllocator()
    first, second = allocator.malloc(12 * MIB), allocator.malloc(12 * MIB)
    addresses = sorted((first.address, second.address))
    allocator.free(second)
    allocator.free(first)
    assert [allocator.malloc(12 * MIB).address for _ in range(2)] == addresses


def test_a_small_block_is_split_when_512_bytes_remain() -> None:
    allocator = CachingAllocator()
    allocator.malloc(MIB)
    assert allocator.malloc(MIB - 512).size_bytes == MIB - 512
    assert allocator.malloc(512).size_bytes == 512
    assert allocator.reserved_bytes == 2 * MIB


def test_a_large_block_is_split_only_when_more_than_a_mebibyte_remains() -> None:
    allocator = CachingAllocator()
    exact = allocator.malloc(11 * MIB)  # 12 MiB segment: 1 MiB would remain
    split = allocator.malloc(11 * MIB - 512)  # 1 MiB and 512 B would
    assert (exact.size_bytes, split.size_bytes) == (12 * MIB, 11 * MIB - 512)
    assert allocator.allocated_bytes == 23 * MIB - 512


def test_a_freed_block_merges_with_its_free_neighbours() -> None:
    allocator = CachingAllocator()
    first, second, third = (allocator.malloc(6 * MIB) for _ in range(3))
    allocator.free(first)
    allocator.free(third)  # merges with the 2 MiB behind it
    assert [b.size_bytes // MIB for b in allocator.segments()[0].blocks] == [6, 6, 8]
    allocator.free(second)
    assert [b.size_bytes // MIB for b in allocator.segments()[0].blocks] == [20]


def test_neighbouring_segments_never_merge() -> None:
    allocator = CachingAllocator()
    for block in [allocator.malloc(20 * MIB), allocator.malloc(20 * MIB)]:
        allocator.free(block)
    assert [part.size_bytes for part in allocator.segments()] == [20 * MIB, 20 * MIB]


def test_a_block_used_on_another_stream_waits_for_its_event() -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(20 * MIB)
    allocator.record_stream(block, 7)
    allocator.free(block)
    assert (allocator.allocated_bytes, allocator.awaiting_bytes) == (0, 20 * MIB)
    allocator.malloc(20 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    assert (allocator.allocated_bytes, allocator.awaiting_bytes) == (20 * MIB, 20 * MIB)
    assert allocator.peak_allocated_bytes == 20 * MIB
    allocator.complete_free(block)
    allocator.malloc(20 * MIB)
    assert allocator.reserved_bytes == 40 * MIB


def test_a_block_used_on_its_own_stream_does_not_wait() -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(512, stream=7)
    allocator.record_stream(block, 7)
    allocator.free(block)
    assert (allocator.allocated_bytes, allocator.awaiting_bytes) == (0, 0)


def test_a_block_cannot_be_freed_twice() -> None:
    allocator = CachingAllocator()
    block = allocator.malloc(512)
    allocator.free(block)
    with pytest.raises(ValueError, match="freed before"):
        allocator.free(block)


def test_everything_cached_is_released_before_one_retry() -> None:
    allocator = CachingAllocator(capacity_bytes=40 * MIB)
    large, small = allocator.malloc(20 * MIB), allocator.malloc(512)
    allocator.free(large)
    allocator.free(small)
    allocator.malloc(30 * MIB)
    assert allocator.alloc_retries == 1
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (30 * MIB, 30 * MIB)


def test_a_segment_that_is_partly_used_is_not_released() -> None:
    allocator = CachingAllocator(capacity_bytes=40 * MIB)
    kept, freed = allocator.malloc(2 * MIB), allocator.malloc(2 * MIB)
    allocator.free(freed)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_waiting_frees_complete_before_the_cache_is_released() -> None:
    allocator = CachingAllocator(capacity_bytes=30 * MIB)
    block = allocator.malloc(20 * MIB)
    allocator.record_stream(block, 7)
    allocator.free(block)
    allocator.malloc(20 * MIB)
    assert allocator.alloc_retries == 1


def test_an_out_of_memory_error_carries_the_numbers() -> None:
    allocator = CachingAllocator(limit_bytes=50 * MIB)
    allocator.malloc(31 * MIB)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(20 * MIB)
    assert str(caught.value) == (
        "out of memory: 20.0 MiB requested, 32.0 MiB allocated, 32.0 MiB reserved of at most "
        "50.0 MiB"
    )
    assert allocator.alloc_retries == 1


def test_the_limit_is_checked_before_cuda_malloc_is_called() -> None:
    class Driver(CachingAllocator):
        def cuda_malloc(self, size_bytes: int) -> int | None:
            raise AssertionError("called")

    with pytest.raises(OutOfMemory):
        Driver(limit_bytes=2 * MIB - 1).malloc(1)


def test_the_limit_may_be_reached_exactly() -> None:
    CachingAllocator(limit_bytes=2 * MIB, capacity_bytes=2 * MIB).malloc(1)


SPLIT_AT_40 = AllocatorSettings(max_split_size_bytes=40 * MIB)


def test_an_oversize_block_is_not_split() -> None:
    allocator = CachingAllocator(SPLIT_AT_40)
    allocator.free(allocator.malloc(60 * MIB))
    assert allocator.malloc(45 * MIB).size_bytes == 60 * MIB


def test_a_small_request_does_not_take_an_oversize_block() -> None:
    allocator = CachingAllocator(SPLIT_AT_40)
    allocator.free(allocator.malloc(40 * MIB))
    allocator.malloc(30 * MIB)
    assert allocator.reserved_bytes == 70 * MIB


def test_an_oversize_request_rejects_a_block_20_mib_larger() -> None:
    allocator = CachingAllocator(SPLIT_AT_40)
    allocator.free(allocator.malloc(60 * MIB))
    allocator.malloc(40 * MIB)
    assert allocator.reserved_bytes == 100 * MIB


def test_oversize_blocks_are_released_first_and_that_is_no_retry() -> None:
    allocator = CachingAllocator(SPLIT_AT_40, capacity_bytes=100 * MIB)
    for block in [allocator.malloc(60 * MIB), allocator.malloc(30 * MIB)]:
        allocator.free(block)
    allocator.malloc(40 * MIB)
    assert allocator.alloc_retries == 0
    assert allocator.reserved_bytes == 70 * MIB


def test_several_oversize_blocks_are_released_from_the_largest() -> None:
    allocator = CachingAllocator(SPLIT_AT_40, capacity_bytes=150 * MIB)
    for block in [allocator.malloc(size * MIB) for size in (40, 50, 60)]:
        allocator.free(block)
    allocator.malloc(100 * MIB)  # 60 and 50 go
    assert allocator.alloc_retries == 0
    assert [part.size_bytes // MIB for part in allocator.segments()] == [40, 100]


def test_garbage_collection_releases_the_blocks_that_were_idle_longest() -> None:
    settings = AllocatorSettings(garbage_collection_threshold=0.5)
    allocator = CachingAllocator(settings, limit_bytes=100 * MIB)
    for block in [allocator.malloc(30 * MIB), allocator.malloc(24 * MIB)]:
        allocator.free(block)
    allocator.free(allocator.malloc(24 * MIB))  # idle for 1 search below, the other one for 2
    allocator.malloc(32 * MIB)  # 54 of 50 MiB are reserved: those idle 1.5 searches or more go
    assert [part.size_bytes // MIB for part in allocator.segments()] == [24, 32]
    assert allocator.alloc_retries == 0


def test_garbage_collection_needs_a_limit() -> None:
    allocator = CachingAllocator(AllocatorSettings(garbage_collection_threshold=0.1))
    allocator.free(allocator.malloc(20 * MIB))
    allocator.malloc(30 * MIB)
    assert allocator.reserved_bytes == 50 * MIB


EXPANDABLE = AllocatorSettings(expandable_segments=True)


def test_an_expandable_segment_grows_in_pages_of_20_mib() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    sizes = []
    for size in (2, 30, 9):  # 2, then 32, then 41 MiB are in use
        allocator.malloc(size * MIB)
        sizes.append(allocator.reserved_bytes // MIB)
    assert sizes == [20, 40, 60]
    assert len(allocator.segments()) == 1


def test_small_pages_are_2_mib() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    for _ in range(3):
        allocator.malloc(MIB)
    assert allocator.reserved_bytes == 4 * MIB
    assert len(allocator.segments()) == 1


def test_expandable_blocks_are_split_when_512_bytes_remain() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    assert allocator.malloc(20 * MIB - 512).size_bytes == 20 * MIB - 512
    assert [b.size_bytes for b in allocator.segments()[0].blocks] == [20 * MIB - 512, 512]


def test_the_best_fit_counts_the_unmapped_tail() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    hole, wall = allocator.malloc(14 * MIB), allocator.malloc(2 * MIB)
    tail = wall.address + wall.size_bytes  # 4 MiB free, and all unmapped room behind them
    allocator.free(hole)
    assert allocator.malloc(3 * MIB).address == hole.address != tail


def test_whole_free_pages_are_unmapped_when_memory_runs_out() -> None:
    allocator = CachingAllocator(EXPANDABLE, capacity_bytes=80 * MIB)
    first, wall = allocator.malloc(50 * MIB), allocator.malloc(2 * MIB)
    allocator.free(first)
    assert allocator.reserved_bytes == 60 * MIB
    allocator.malloc(60 * MIB)  # two free pages go; page 3 holds the wall
    assert wall.address == allocator.segments()[0].address + 10 * MIB
    assert allocator.alloc_retries == 1
    assert allocator.reserved_bytes == 80 * MIB


def test_an_expandable_segment_that_is_wholly_free_disappears() -> None:
    allocator = CachingAllocator(EXPANDABLE, capacity_bytes=GIB)
    blocks = [allocator.malloc(size) for size in (512, 3 * MIB, 30 * MIB)]
    for block in blocks:
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.segments()) == (0, ())


def test_unmapped_gaps_are_filled_first() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    first = allocator.malloc(40 * MIB)
    allocator.malloc(20 * MIB)
    start = first.address
    allocator.free(first)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    assert allocator.malloc(30 * MIB).address == start


def test_peaks_and_counts_start_at_zero() -> None:
    allocator = CachingAllocator()
    assert allocator.peak_allocated_bytes == allocator.peak_reserved_bytes == 0


def test_settings_are_read_from_the_environment_text() -> None:
    settings = AllocatorSettings.parse(
        "max_split_size_mb:128, garbage_collection_threshold:0.8,expandable_segments:True,"
        "pinned_use_background_threads:True"
    )
    assert settings == AllocatorSettings(
        max_split_size_bytes=128 * MIB,
        garbage_collection_threshold=0.8,
        expandable_segments=True,
        unknown=("pinned_use_background_threads",),
    )
    assert AllocatorSettings.parse("") == AllocatorSettings()


def test_roundup_divisions_may_depend_on_the_size_class() -> None:
    settings = AllocatorSettings.parse("roundup_power2_divisions:[64:8,256:4,1024:2,>:1]")
    by_mib = {mib: settings.divisions(mib * MIB) for mib in (1, 64, 127, 128, 300, 1024, 5000)}
    assert by_mib == {1: 8, 64: 8, 127: 8, 128: 0, 300: 4, 1024: 2, 5000: 1}
    assert settings.divisions(512) == 8
    assert AllocatorSettings.parse("roundup_power2_divisions:4").divisions(GIB) == 4


def test_rounding_divisions_reach_the_allocator() -> None:
    settings = AllocatorSettings.parse("roundup_power2_divisions:4")
    assert CachingAllocator(settings).malloc(1100 * KIB).size_bytes == 1280 * KIB


def test_the_large_segment_size_may_be_set() -> None:
    assert reserved_by(AllocatorSettings.parse("large_segment_size_mb:12"), 2 * MIB) == 12 * MIB


@pytest.mark.parametrize(
    "text",
    [
        "max_split_size_mb:many",
        "max_split_size_mb:19",
        "max_split_size_mb",
        "garbage_collection_threshold:1.5",
        "garbage_collection_threshold:nan",
        "expandable_segments:yes",
        "roundup_power2_divisions:3",
        "roundup_power2_divisions:[64:3]",
        "roundup_power2_divisions:[65:4]",
        "roundup_power2_divisions:[",
        "large_segment_size_mb:5",
    ],
)
def test_malformed_settings_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match="allocator setting") as caught:
        AllocatorSettings.parse(text)
    assert "\n" not in str(caught.value)


def limited(limit):
    return CachingAllocator(limit_bytes=limit)


def test_simulate_reports_peaks_and_where_they_are() -> None:
    replay = simulate([MIB, 3 * MIB, 100], [0, 1, ~1, 2, ~0], timeline=True)
    assert (replay.peak_allocated_bytes, replay.peak_event) == (4 * MIB, 1)
    assert replay.peak_reserved_bytes == 22 * MIB
    assert replay.allocated_bytes == (MIB, 4 * MIB, MIB, MIB + 512, 512)
    assert replay.reserved_bytes == (2 * MIB, *[22 * MIB] * 4)
    assert replay.fits


def test_simulate_stops_at_the_request_that_fails() -> None:
    replay = simulate([MIB, 30 * MIB], [0, 1], allocator=limited(20 * MIB), timeline=True)
    assert replay.oom_event == 1
    assert not replay.fits
    assert len(replay.allocated_bytes) == 1


def test_a_trace_that_needs_a_retry_does_not_fit() -> None:
    replay = simulate([20 * MIB, 30 * MIB], [0, ~0, 1], allocator=limited(40 * MIB))
    assert (replay.oom_event, replay.alloc_retries, replay.fits) == (None, 1, False)


def test_blocks_without_bytes_take_no_memory() -> None:
    assert simulate([0, 1], [0, 1, ~0]).peak_allocated_bytes == 512


def test_an_empty_trace_fits_in_nothing() -> None:
    assert simulate([], [], allocator=limited(0)).fits


@dataclass
class Trace:
    """A random program: sizes, streams, and what is freed when."""

    sizes: list[int]
    streams: list[int]
    events: list[int]


SIZES = st.one_of(
    st.integers(1, 4096),
    st.integers(1, 3 * MIB),
    st.integers(MIB, 64 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 2 * MIB, 10 * MIB, 20 * MIB, 40 * MIB]),
)

SETTINGS = st.sampled_from(
    [
        AllocatorSettings(),
        SPLIT_AT_40,
        EXPANDABLE,
        AllocatorSettings(roundup_power2_divisions=4),
        AllocatorSettings(garbage_collection_threshold=0.5),
        AllocatorSettings(expandable_segments=True, max_split_size_bytes=40 * MIB),
    ]
)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    trace = Trace(sizes=[], streams=[], events=[])
    live: list[int] = []
    for _ in range(draw(st.integers(0, 40))):
        freeing = draw(st.booleans())
        if live and freeing:
            trace.events.append(~live.pop(draw(st.integers(0, len(live) - 1))))
        else:
            live.append(len(trace.sizes))
            trace.events.append(len(trace.sizes))
            trace.sizes.append(draw(SIZES))
            trace.streams.append(draw(st.sampled_from([0, 0, 0, 7])))
    return trace


def run(trace: Trace, allocator: CachingAllocator, check: bool = False) -> dict[int, Block]:
    """Play a trace and return what lives at the end; requests that fail are left out."""
    live: dict[int, Block] = {}
    for event in trace.events:
        try:
            if event >= 0:
                live[event] = allocator.malloc(trace.sizes[event], trace.streams[event])
            elif ~event in live:
                allocator.free(live.pop(~event))
        except OutOfMemory:
            pass
        if check:
            assert_sound(allocator)
    return live


def assert_sound(allocator: CachingAllocator) -> None:
    segments = allocator.segments()
    end = 0
    for part in segments:
        assert part.address >= end
        end = part.address + part.size_bytes
        address, before_free = part.address, False
        for block in part.blocks:
            assert block.address == address
            assert block.size_bytes > 0
            assert block.size_bytes % 512 == 0
            assert block.requested_bytes <= block.size_bytes
            assert not (before_free and block.state == "free")
            before_free = block.state == "free"
            address += block.size_bytes
        assert address == end
    assert allocator.reserved_bytes == sum(part.size_bytes for part in segments)
    assert allocator.allocated_bytes == sum(
        block.size_bytes for part in segments for block in part.blocks if block.state == "allocated"
    )
    assert allocator.allocated_bytes <= allocator.reserved_bytes


@given(traces(), SETTINGS, st.sampled_from([None, 100 * MIB, 200 * MIB]))
def test_blocks_always_tile_their_segments_and_never_overlap(
    trace: Trace, settings: AllocatorSettings, capacity: int | None
) -> None:
    allocator = CachingAllocator(settings, capacity_bytes=capacity, limit_bytes=capacity)
    run(trace, allocator, check=True)
    assert capacity is None or allocator.peak_reserved_bytes <= capacity


@given(traces(), SETTINGS)
def test_after_everything_is_freed_each_segment_is_one_free_block(
    trace: Trace, settings: AllocatorSettings
) -> None:
    allocator = CachingAllocator(settings, capacity_bytes=300 * MIB)
    for block in run(trace, allocator).values():
        allocator.free(block)
    assert all(len(part.blocks) == 1 for part in allocator.segments())
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (0, 0)


@given(traces(), SETTINGS, st.sampled_from([None, 100 * MIB]))
def test_simulate_agrees_with_calls_by_hand_and_is_deterministic(
    trace: Trace, settings: AllocatorSettings, limit: int | None
) -> None:
    def simulated():
        allocator = CachingAllocator(settings, limit_bytes=limit)
        return simulate(trace.sizes, trace.events, allocator=allocator, streams=trace.streams)

    replay = simulated()
    assert replay == simulated()
    if replay.oom_event is None:
        allocator = CachingAllocator(settings, limit_bytes=limit)
        run(trace, allocator)
        assert allocator.peak_allocated_bytes == replay.peak_allocated_bytes
        assert allocator.peak_reserved_bytes == replay.peak_reserved_bytes
        assert allocator.alloc_retries == replay.alloc_retries


@given(traces(), SETTINGS)
def test_segments_can_be_taken_over_by_a_new_allocator(
    trace: Trace, settings: AllocatorSettings
) -> None:
    allocator = CachingAllocator(settings)
    run(trace, allocator)
    copy = CachingAllocator.from_segments(allocator.segments(), settings)
    assert copy.segments() == allocator.segments()
    for part in allocator.segments():
        size = part.size_bytes
        assert (
            copy.malloc(size, part.stream).size_bytes
            == allocator.malloc(size, part.stream).size_bytes
        )


def oracle(trace: Trace) -> tuple[list[int], int]:
    """Decide every block by the default rules, searching everything, without any index.

    Returns the offset-free identity of each choice (segment number, offset) and reserved bytes.
    """
    segments: list[tuple[int, bool, list[list[int]]]] = []  # stream, small, [offset, size, block]
    choices: list[int] = []
    reserved = 0
    for event in trace.events:
        if event >= 0:
            size = max(512, -(-trace.sizes[event] // 512) * 512)
            kind = (trace.streams[event], size <= MIB)
            fits = [
                (part[1], number, index)
                for number, (stream, small, parts) in enumerate(segments)
                for index, part in enumerate(parts)
                if (stream, small) == kind and part[2] < 0 and part[1] >= size
            ]
            if not fits:
                new = 2 * MIB if kind[1] else 20 * MIB if size < 10 * MIB else 0
                new = new or -(-size // (2 * MIB)) * 2 * MIB
                reserved += new
                segments.append((*kind, [[0, new, -1]]))
                fits = [(new, len(segments) - 1, 0)]
            found, number, index = min(fits)
            parts = segments[number][2]
            choices.append(number * GIB + parts[index][0])
            if found - size >= (512 if kind[1] else MIB + 1):
                parts.insert(index + 1, [parts[index][0] + size, found - size, -1])
                parts[index][1] = size
            parts[index][2] = event
        else:
            for _, _, parts in segments:
                for part in parts:
                    if part[2] == ~event:
                        part[2] = -1
                for index in range(len(parts) - 1, 0, -1):
                    if parts[index][2] < 0 and parts[index - 1][2] < 0:
                        parts[index - 1][1] += parts.pop(index)[1]
    return choices, reserved


@given(traces())
def test_every_choice_agrees_with_a_plain_search_of_everything(trace: Trace) -> None:
    choices: list[int] = []
    starts: list[int] = []

    class Logged(CachingAllocator):
        def cuda_malloc(self, size_bytes: int) -> int | None:
            address = super().cuda_malloc(size_bytes)
            assert address is not None
            starts.append(address)
            return address

        def malloc(
            self, size_bytes: int, stream: int = 0, pool_id: tuple[int, int] = (0, 0)
        ) -> Block:
            block = super().malloc(size_bytes, stream, pool_id)
            number = max(n for n, start in enumerate(starts) if start <= block.address)
            choices.append(number * GIB + block.address - starts[number])
            return block

    allocator = Logged()
    run(trace, allocator)
    assert (choices, allocator.reserved_bytes) == oracle(trace)


def test_an_expandable_segment_taken_over_does_not_grow_into_another() -> None:
    allocator = CachingAllocator(EXPANDABLE, capacity_bytes=100 * MIB)
    allocator.malloc(20 * MIB, 0)
    allocator.malloc(20 * MIB, 7)
    unlimited = CachingAllocator.from_segments(allocator.segments(), EXPANDABLE)
    taken = [unlimited.malloc(20 * MIB, stream) for stream in (0, 7, 5) for _ in range(30)]
    assert len({block.address for block in taken}) == 90
    for block in taken:
        unlimited.free(block)
    unlimited.empty_cache()
    assert unlimited.reserved_bytes == unlimited.allocated_bytes == 40 * MIB
