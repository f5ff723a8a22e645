"""Random programs, recorded as the caching allocator would record them."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import strategies as st

from autobatch.memory.allocator import OutOfMemory
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.segments import Block
from autobatch.support.units import MIB
from tests.support.recordings import EXPANDABLE, PRIVATE, Recorder, recorder


@st.composite
def recordings(draw: st.DrawFn) -> Recorder:
    """A random program on several streams, recorded from somewhere in its middle."""
    made = recorder(
        draw(
            st.sampled_from(
                [
                    AllocatorSettings(),
                    EXPANDABLE,
                    AllocatorSettings(max_split_size_bytes=40 * MIB),
                    AllocatorSettings(roundup_power2_divisions=8),
                ]
            )
        ),
        capacity=draw(st.sampled_from([None, 150 * MIB])),
    )
    live: list[Block] = []
    steps = draw(st.integers(0, 40))
    start = draw(st.integers(0, steps))
    for step in range(steps):
        if step == start:
            made.record()
        action = draw(st.integers(0, 9))
        if live and action < 4:
            block = live.pop(draw(st.integers(0, len(live) - 1)))
            if action == 0:
                made.record_stream(block, 99)
            made.free(block)
        elif action == 9 and draw(st.booleans()):
            made.empty_cache()
        else:
            stream, pool_id = draw(st.sampled_from([(0, (0, 0)), (7, (0, 0)), (0, PRIVATE)]))
            size = draw(st.one_of(st.integers(1, 3 * MIB), st.integers(MIB, 50 * MIB)))
            with suppress(OutOfMemory):
                live.append(made.alloc(size, stream, pool_id))
    return made
