import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.memory.alignment import Misaligned, scratch_blocks
from autobatch.memory.trace import CATEGORIES, Allocation, Mark, Trace
from autobatch.memory.trace_model import TraceModel

MARKS = (Mark(0, "forward", 0, 0),)


def make_trace(micro_batch, sizes, events=None, **block_fields):
    fields = {"category": "activations", "phase": "forward", "op": "aten.mm"} | block_fields
    blocks = tuple(
        Allocation(size, fields["category"], fields["phase"], fields["op"]) for size in sizes
    )
    events = tuple(range(len(blocks))) if events is None else tuple(events)
    return Trace(
        micro_batch=micro_batch, accumulation_steps=1, blocks=blocks, events=events, marks=MARKS
    )


@st.composite
def polynomial_traces(draw, degree):
    """Return a function from the micro-batch to a trace with random kinds, frees and sizes."""
    whole = st.integers(0, 10**9)
    rows = st.tuples(whole, *[whole if power <= degree else st.just(0) for power in (1, 2)])
    coefficients = draw(st.lists(rows, min_size=1, max_size=12))
    kinds = [
        (
            draw(st.sampled_from(CATEGORIES)),
            draw(st.sampled_from(["forward", "backward"])),
            f"op{i}",
        )
        for i in range(len(coefficients))
    ]
    events, live = [], []
    for index in range(len(coefficients)):
        events.append(index)
        live.append(index)
        while live and draw(st.booleans()):
            events.append(~live.pop(draw(st.integers(0, len(live) - 1))))

    def trace_at(n):
        sizes = [base + slope * n + bend * n * n for base, slope, bend in coefficients]
        blocks = tuple(Allocation(s, *kind) for s, kind in zip(sizes, kinds, strict=True))
        return Trace(
            micro_batch=n, accumulation_steps=1, blocks=blocks, events=tuple(events), marks=MARKS
        )

    return trace_at


nodes = st.lists(st.integers(1, 64), min_size=3, max_size=3, unique=True)


@given(polynomial_traces(degree=1), nodes, st.integers(1, 5000))
def test_two_affine_traces_give_every_other_one_exactly(trace_at, nodes, n):
    model = TraceModel.fit([trace_at(node) for node in nodes[:2]])
    assert model.degree == 1
    assert model.trace(n) == trace_at(n)
    assert model.difference(trace_at(n)) is None
    assert max(model.trace(n).allocated()) == max(trace_at(n).allocated())


@given(polynomial_traces(degree=2), nodes, st.integers(1, 5000))
def test_three_quadratic_traces_give_every_other_one_exactly(trace_at, nodes, n):
    model = TraceModel.fit([trace_at(node) for node in nodes])
    assert model.trace(n) == trace_at(n)
    bent = any(
        trace_at(1).sizes[i] + trace_at(3).sizes[i] != 2 * trace_at(2).sizes[i]
        for i in range(len(trace_at(1).blocks))
    )
    assert model.degree == (2 if bent else 1)


@given(nodes, st.lists(st.tuples(*[st.integers(0, 10**9)] * 3), min_size=1, max_size=8))
def test_fitted_traces_are_reproduced_whatever_their_sizes_are(nodes, rows):
    traces = [make_trace(n, [row[i] for row in rows]) for i, n in enumerate(nodes)]
    model = TraceModel.fit(traces)
    assert all(model.difference(trace) is None for trace in traces)


def test_a_size_between_bytes_is_rounded_to_the_nearest_one_where_kernels_vary():
    traces = [make_trace(1, [9, 99]), make_trace(4, [10, 101])]
    model = TraceModel.fit(traces, kernels_may_vary=True)
    assert [model.sizes(n) for n in (1, 2, 3, 4)] == [[9, 99], [9, 100], [10, 100], [10, 101]]
    exact = TraceModel.fit(traces)
    assert [exact.sizes(n) for n in (1, 4, 7)] == [[9, 99], [10, 101], [11, 103]]
    for ask in (exact.sizes, exact.trace, exact.requests):
        with pytest.raises(Misaligned, match=r"1, 4 foretells 9\.33.* at micro-batch 2, which no"):
            ask(2)


def test_sizes_that_shrink_below_zero_refute_the_model_or_stop_there_where_kernels_vary():
    traces = [make_trace(2, [100]), make_trace(3, [60])]
    model = TraceModel.fit(traces, kernels_may_vary=True)
    assert [model.sizes(n) for n in (1, 4, 5, 100)] == [[140], [20], [0], [0]]
    exact = TraceModel.fit(traces)
    assert [exact.sizes(n) for n in (1, 4)] == [[140], [20]]
    with pytest.raises(Misaligned, match="foretells -20 at micro-batch 5"):
        exact.sizes(5)
    assert "-20" in exact.difference(make_trace(5, [0]))
    assert not exact.predicts_start_of(make_trace(5, [0]))


def test_a_quadratic_block_shows_as_a_difference_at_a_third_size():
    traces = [make_trace(n, [512, n * n * 4]) for n in (2, 3, 5)]
    sentence = TraceModel.fit(traces[:2]).difference(traces[2])
    assert sentence == ("block 1 (aten.mm, forward) at micro-batch 5: expected 76 bytes, found 100")
    assert TraceModel.fit(traces).difference(traces[2]) is None


def test_the_peak_and_its_slope_count_only_what_is_alive_at_once():
    events = [0, 1, ~1, 2]
    model = TraceModel.fit([make_trace(n, [1000, 10 * n, 4 * n], events) for n in (2, 3)])
    assert max(model.trace(50).allocated()) == 1000 + 10 * 50
    assert max(model.trace(2).allocated()) == 1000 + 10 * 2


def test_a_trace_without_events_has_no_peak():
    model = TraceModel.fit([make_trace(2, []), make_trace(3, [])])
    assert model.trace(7).allocated() == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_trace(3, [8, 8], op="aten.bmm"), r"event 0: .*aten\.mm.* against .*aten\.bmm"),
        (make_trace(3, [8, 8], category="gradients"), r"event 0: .*activations.* against .*grad"),
        (make_trace(3, [8, 8], phase="step"), r"event 0: .*forward.* against .*step"),
        (make_trace(3, [8, 8], [0, ~0, 1]), r"event 1: alloc of block 1.* against free of block 0"),
        (make_trace(3, [8, 8, 8]), r"length: 2 and 3 events"),
    ],
)
def test_traces_that_do_not_align_name_the_first_difference(other, message):
    first = make_trace(2, [8, 8])
    with pytest.raises(Misaligned, match=message):
        TraceModel.fit([first, other])
    model = TraceModel.fit([first, make_trace(4, [8, 8])])
    assert "micro-batch 4 and 3 differ" in (model.difference(other) or "")


def test_traces_of_different_windows_do_not_align():
    one = make_trace(2, [8])
    two = Trace(micro_batch=3, accumulation_steps=2, blocks=one.blocks, events=(0,), marks=MARKS)
    with pytest.raises(Misaligned, match="accumulation steps: 1 and 2"):
        TraceModel.fit([one, two])
    moved = Trace(micro_batch=3, accumulation_steps=1, blocks=one.blocks, events=(0,), marks=())
    with pytest.raises(Misaligned, match="where their phases begin"):
        TraceModel.fit([one, moved])


@pytest.mark.parametrize("sizes", [(), (2, 2), (1, 2, 3, 4)])
def test_a_fit_needs_one_to_three_different_micro_batches(sizes):
    with pytest.raises(ValueError, match="1 to 3 different micro-batches"):
        TraceModel.fit([make_trace(n, [8]) for n in sizes])


def test_blocks_that_are_padded_do_not_make_memory_quadratic():
    def trace_at(n):
        return make_trace(n, [100_000 * n, -(-n // 32) * 32])

    assert TraceModel.fit([trace_at(n) for n in (2, 3, 40)]).quadratic_share(40) < 1e-3
    bent = [make_trace(n, [1000 * n, 100 * n * n]) for n in (2, 3, 40)]
    assert TraceModel.fit(bent).quadratic_share(40) > 0.5


# Scratch memory of real kernels


def scratched(n, scratch, events):
    """One kept block, scratch in the middle, another kept block."""
    return make_trace(n, [100_000 * n, *scratch, 10_000 * n], events)


def test_scratch_that_only_one_size_has_is_left_out_of_the_alignment():
    with_it = scratched(3, [900], [0, 1, ~1, 2])
    without = make_trace(2, [200_000, 20_000])
    with pytest.raises(Misaligned):
        TraceModel.fit([without, with_it])
    model = TraceModel.fit([without, with_it], kernels_may_vary=True)
    assert model.sizes(6) == [600_000, 1800, 60_000]  # in proportion to the micro-batch
    other_way = TraceModel.fit(
        [scratched(2, [700], [0, 1, ~1, 2]), make_trace(3, [300_000, 30_000])],
        kernels_may_vary=True,
    )
    assert other_way.sizes(6) == [600_000, 60_000]


def test_scratch_of_several_buffers_may_be_freed_in_any_order():
    first = scratched(2, [500, 600], [0, 1, 2, ~1, ~2, 3])
    second = make_trace(3, [300_000, 30_000])
    model = TraceModel.fit([first, second], kernels_may_vary=True)
    assert model.sizes(10) == [1_000_000, 100_000]


def test_scratch_never_shrinks_with_the_micro_batch():
    first, second = (scratched(n, [900 // n], [0, 1, ~1, 2]) for n in (2, 3))
    model = TraceModel.fit([first, second], kernels_may_vary=True)
    assert model.sizes(100) == [10_000_000, 300, 1_000_000]


def test_scratch_follows_the_two_largest_sizes():
    traces = [scratched(n, [s], [0, 1, ~1, 2]) for n, s in ((2, 5000), (10, 100), (20, 110))]
    model = TraceModel.fit(traces, kernels_may_vary=True)
    assert model.sizes(20)[1] == 110 and model.sizes(30)[1] == 120
    assert model.degree == 1


def test_a_buffer_that_only_one_size_has_may_stay_longer_than_scratch():
    traces = [make_trace(2, [200_000, 500, 20_000]), make_trace(3, [300_000, 30_000])]
    model = TraceModel.fit(traces, kernels_may_vary=True)
    assert model.sizes(6) == [600_000, 60_000]
    assert scratch_blocks(make_trace(2, [200, 5, 20], [0, 1, 2, ~0, ~1, ~2])) == {0, 1, 2}


@pytest.mark.parametrize("extra", [[20_000], [200_000]])
@pytest.mark.parametrize("larger", [False, True])
def test_traces_with_too_little_in_common_do_not_align(extra, larger):
    traces = [make_trace(n, [100_000 * n] * 3) for n in (2, 3)]
    traces[larger] = make_trace(2 + larger, [*traces[larger].sizes, *extra])
    if extra == [20_000]:
        assert TraceModel.fit(traces, kernels_may_vary=True).sizes(4)[:3] == [400_000] * 3
    else:
        with pytest.raises(Misaligned, match=r"length.* and too much is in one of them only"):
            TraceModel.fit(traces, kernels_may_vary=True)


def test_caches_may_be_emptied_in_any_order():
    first = make_trace(2, [200, 20, 2], [0, 1, 2, ~0, ~1, ~2])
    second = make_trace(3, [300, 30, 3], [0, 1, 2, ~2, ~0, ~1])
    for kernels_may_vary in (False, True):
        model = TraceModel.fit([first, second], kernels_may_vary=kernels_may_vary)
        assert model.sizes(10) == [1000, 100, 10]
    assert model.difference(make_trace(4, [400, 40, 4], [0, 1, 2, ~1, ~2, ~0])) is None


def test_what_is_freed_before_something_else_is_allocated_stays_so():
    first = make_trace(2, [200, 20, 2], [0, 1, ~0, 2, ~1, ~2])
    second = make_trace(3, [300, 30, 3], [0, 1, ~1, 2, ~0, ~2])
    with pytest.raises(Misaligned):
        TraceModel.fit([first, second])


@given(polynomial_traces(degree=2), nodes)
def test_traces_that_align_strictly_also_align_without_their_scratch(trace_at, nodes):
    traces = [trace_at(node) for node in nodes]
    model = TraceModel.fit(traces, kernels_may_vary=True)
    scratch = scratch_blocks(model.template)
    for trace in traces:
        expected = [s for i, s in enumerate(trace.sizes) if i not in scratch]
        found = [s for i, s in enumerate(model.sizes(trace.micro_batch)) if i not in scratch]
        assert found == expected
    largest = max(traces, key=lambda trace: trace.micro_batch)
    assert tuple(model.sizes(largest.micro_batch)) == largest.sizes


@pytest.mark.slow
def test_a_hundred_thousand_events_are_no_matter():
    events = [event for index in range(50_000) for event in (index, ~index)]
    traces = [make_trace(n, [512 + index * n for index in range(50_000)], events) for n in (2, 3)]
    model = TraceModel.fit(traces)
    trace = model.trace(64)
    assert model.difference(trace) is None
    assert max(model.trace(64).allocated()) == 512 + 49_999 * 64
