"""The allocator as it is compiled, beside the same source run as Python."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.memory import allocator as compiled
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.support.units import MIB
from reports.common.of_source import of_source

PYTHON = of_source()

settings = st.sampled_from(
    [
        AllocatorSettings(),
        AllocatorSettings(expandable_segments=True),
        AllocatorSettings(max_split_size_bytes=40 * MIB),
        AllocatorSettings(garbage_collection_threshold=0.5),
        AllocatorSettings(roundup_power2_divisions=8),
    ]
)
sizes = st.lists(st.integers(0, 3 * MIB) | st.integers(MIB, 60 * MIB), min_size=1, max_size=60)


@st.composite
def events(draw: st.DrawFn, count: int) -> list[int]:
    """Every block is allocated, and some are freed, at once or later."""
    made: list[int] = []
    live: list[int] = []
    for block in range(count):
        made.append(block)
        live.append(block)
        while live and draw(st.booleans()):
            made.append(~live.pop(draw(st.integers(0, len(live) - 1))))
    return made


def ran(module: Any, options: dict[str, Any], trace: tuple[Any, ...]) -> tuple[Any, ...]:
    allocator = module.CachingAllocator(**options)
    instants: list[tuple[int, int]] = []
    ends = allocator.run(*trace, instants)
    return ends, instants, allocator.segments(), allocator.alloc_retries


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_it_is_compiled() -> None:
    assert not compiled.__file__.endswith(".py")
    assert PYTHON.__file__ is not None and PYTHON.__file__.endswith(".py")


@given(st.data(), settings, sizes, st.sampled_from([None, 150 * MIB]))
def test_it_does_what_the_source_does(
    data: st.DataObject, chosen: AllocatorSettings, blocks: list[int], limit: int | None
) -> None:
    streams = data.draw(st.none() | st.lists(st.integers(0, 1), min_size=60, max_size=60))
    trace = (blocks, data.draw(events(len(blocks))), streams)
    options = {"settings": chosen, "limit_bytes": limit, "capacity_bytes": limit}
    assert ran(compiled, options, trace) == ran(PYTHON, options, trace)


@pytest.mark.parametrize("module", [compiled, PYTHON])
@pytest.mark.parametrize("size", [1 << 61, 1 << 62, 1 << 70])
def test_a_request_beyond_all_memory_is_out_of_memory(module: Any, size: int) -> None:
    allocator = module.CachingAllocator(capacity_bytes=1 << 40)
    with pytest.raises(module.OutOfMemory):
        allocator.malloc(size)
    assert allocator.reserved_bytes == 0
