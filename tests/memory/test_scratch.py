"""Scratch is put where a kernel takes it, and is asked for again at every micro-batch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autobatch.memory.alignment import Misaligned
from autobatch.memory.replay import simulate
from autobatch.memory.scratch import RESULT, RESULTS, with_scratch
from autobatch.memory.trace import Allocation, Bare, Kernel, Mark, Trace
from autobatch.memory.trace_model import TraceModel


def whole(micro_batch: int, steps, *, start: int = 1, results=(2, 3), end: int = 3, count: int = 1):
    """Return a trace of three blocks, of which one kernel makes the last two."""
    bare = Trace(
        micro_batch=micro_batch,
        accumulation_steps=1,
        blocks=tuple(Allocation(8 * micro_batch, "temporaries", "forward", op) for op in "abc"),
        events=(0, 1, 2, ~0),
        marks=(Mark(0, "inputs", 0, 0), Mark(1, "forward", 0, 0), Mark(4, "step", 0, 0)),
    )
    kernel = Kernel(
        kind="pair",
        name="scratch",
        phase="forward",
        stream=0,
        start=start,
        results=results,
        end=end,
        marks=2,
        numbers=(micro_batch,),
        takes=lambda numbers: steps(*numbers),
    )
    return with_scratch(Bare(bare, (kernel,) * count))


def sizes(trace) -> list[int]:
    """Return what each event takes, or gives back as a negative number."""
    return [
        trace.blocks[event].size_bytes if event >= 0 else -trace.blocks[~event].size_bytes
        for event in trace.events
    ]


def test_pieces_lie_between_the_results_that_their_steps_name():
    trace = whole(1, lambda n: [1, 2, ~0, RESULT, 3, ~2, RESULTS, 4])
    assert sizes(trace) == [8, 1, 2, -1, 8, 3, -3, 8, 4, -2, -4, -8]
    assert [mark.event for mark in trace.marks] == [0, 1, 12]
    assert {b.category for b in trace.blocks if b.op == "scratch"} == {"workspace"}


def test_no_bytes_are_no_event_and_are_counted():
    assert sizes(whole(1, lambda n: [0, 5, ~1, 6, ~0])) == [8, 5, -5, 6, 8, 8, -6, -8]


def test_text_names_the_pieces_that_follow():
    trace = whole(1, lambda n: [1, "copy", 2])
    assert [b.op for b in trace.blocks if b.size_bytes < 8] == ["scratch", "copy"]


def test_a_model_asks_the_rule_where_no_line_leads():
    def steps(n: int):
        return [RESULTS, 1000] if n >= 7 else []

    model = TraceModel.fit([whole(2, steps), whole(3, steps)])
    assert model.trace(6).sizes == (48, 48, 48)
    assert model.trace(7) == whole(7, steps)
    assert model.difference(whole(9, steps)) is None
    assert max(model.trace(7).allocated()) == 3 * 56 + 1000


def test_other_kernels_do_not_align():
    with pytest.raises(Misaligned, match="other kernels"):
        TraceModel.fit([whole(2, lambda n: []), whole(3, lambda n: [], count=2)])
    with pytest.raises(Misaligned, match="differ in a kernel"):
        TraceModel.fit([whole(2, lambda n: []), whole(3, lambda n: [], end=4)])


def asked(sizes, events) -> list[int]:
    """Return what each event asks for, or gives back as a negative number."""
    return [sizes[event] if event >= 0 else -sizes[~event] for event in events]


@pytest.mark.parametrize("n", [4, 7, 11])
def test_requests_of_a_model_are_those_of_its_trace(n):
    def steps(n: int):
        return [1, 2, ~0, RESULT, 1000, RESULTS, 5] if n >= 7 else [2, ~0]

    model = TraceModel.fit([whole(2, steps, count=3), whole(3, steps, count=3)])
    trace = model.trace(n)
    requests = model.requests(n)
    assert asked(requests.sizes, requests.events) == asked(trace.sizes, trace.events)
    assert requests.streams is None


def test_a_kernel_is_asked_once_for_all_calls_with_the_same_numbers():
    calls = []

    def steps(n: int):
        calls.append(n)
        return [n]

    model = TraceModel.fit([whole(2, steps, count=5), whole(3, steps, count=5)])
    calls.clear()
    model.requests(9)
    assert calls == [9]


def test_scratch_of_another_stream_is_asked_for_there():
    bare = whole(2, lambda n: [4]).bare
    other = whole(3, lambda n: [4]).bare
    moved = [
        with_scratch(Bare(one.trace, tuple(replace(kernel, stream=1) for kernel in one.kernels)))
        for one in (bare, other)
    ]
    model = TraceModel.fit(moved)
    sizes, events, streams = model.requests(5)
    assert streams == [0, 0, 0, 1]
    assert simulate(sizes, events, streams=streams) == simulate(
        model.trace(5).sizes, model.trace(5).events, streams=model.trace(5).streams
    )


@pytest.mark.parametrize("kernels_may_vary", [False, True])
def test_a_rule_is_never_asked_of_a_negative_size_that_was_not_given_to_it(kernels_may_vary):
    def at(micro_batch, *numbers):
        bare = whole(micro_batch, lambda n: ()).bare
        (kernel,) = bare.kernels

        def takes(numbers):
            assert numbers[0] >= 0
            return [8 * numbers[0]]

        return with_scratch(Bare(bare.trace, (replace(kernel, numbers=numbers, takes=takes),)))

    # a dimension counted from the end is -1 throughout; a size that shrinks ends at 3
    model = TraceModel.fit([at(2, 1, -1), at(3, 0, -1)], kernels_may_vary=kernels_may_vary)
    assert list(model.requests(3).sizes) == [24, 24, 24]
    for ask in (model.trace, model.requests):
        with pytest.raises(Misaligned, match="foretells -1 at micro-batch 4"):
            ask(4)
