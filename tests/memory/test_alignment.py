from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.memory.alignment import (
    by_moment,
    counterparts,
    longest_common,
    with_frees_in_order,
)
from autobatch.memory.trace import Allocation, Mark, Trace

letters = st.lists(st.integers(0, 3), max_size=12)


def length_of_longest_common(first, second):
    table = {(i, j): 0 for i in range(-1, len(first)) for j in range(-1, len(second))}
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            longer = table[i - 1, j - 1] + 1 if a == b else 0
            table[i, j] = max(longer, table[i - 1, j], table[i, j - 1])
    return table[len(first) - 1, len(second) - 1]


@given(letters, letters)
def test_the_longest_common_subsequence_is_one_and_the_longest(first, second):
    pairs = longest_common(len(first), len(second), lambda i, j: first[i] == second[j])
    assert all(first[i] == second[j] for i, j in pairs)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(pairs))
    assert len(pairs) == length_of_longest_common(first, second)


def test_a_difference_in_ten_thousand_takes_one_look_at_each():
    asked = []

    def same(i, j):
        asked.append(i)
        return i == j

    assert len(longest_common(10_000, 10_001, same)) == 10_000
    assert len(asked) < 30_000


def test_sequences_with_nothing_in_common_are_given_up_in_time():
    asked = []

    def same(i, j):
        asked.append(i)
        return i == j and i < 7

    assert longest_common(50_000, 50_000, same, most=100) == [(i, i) for i in range(7)]
    assert len(asked) < 20_000


def trace(micro_batch, forward, backward):
    sizes = [*forward, *backward]
    blocks = tuple(Allocation(size, "activations", "forward", "") for size in sizes)
    marks = (Mark(1, "forward", 0, 0), Mark(1 + len(forward), "backward", 0, 0))
    setup = Allocation(7, "parameters", "setup", "")
    events = range(1 + len(sizes))
    return Trace(
        micro_batch=micro_batch,
        accumulation_steps=1,
        blocks=(setup, *blocks),
        events=tuple(events),
        marks=marks,
    )


def test_allocations_are_grouped_by_when_they_are_made():
    assert by_moment(trace(2, [10, 20], [30])) == {
        (0, 0, "setup"): [0],
        (0, 0, "forward"): [1, 2],
        (0, 0, "backward"): [3],
    }


def test_a_buffer_more_shifts_no_pair():
    small, large = trace(2, [2000, 4000], [8000]), trace(6, [6000, 10**6, 12_000], [24_000])
    assert counterparts(small, large) == {0: 0, 1: 1, 3: 2, 4: 3}


@pytest.mark.parametrize(("size", "paired"), [(18_000, True), (19_000, False), (1400, False)])
def test_a_pair_has_sizes_that_the_micro_batches_explain(size, paired):
    small, large = trace(2, [2000], []), trace(6, [size, 1], [])
    assert (counterparts(small, large).get(1) == 1) is paired


@pytest.mark.slow
@given(st.data())
def test_frees_in_a_row_get_one_order_and_stay_where_they_are(data):
    blocks = data.draw(st.integers(1, 8))
    events, live = [], []
    for block in range(blocks):
        events.append(block)
        live.append(block)
        freed = data.draw(st.sets(st.sampled_from(live))) if live else set()
        events.extend(~one for one in data.draw(st.permutations(sorted(freed))))
        live = [one for one in live if one not in freed]
    place = data.draw(st.integers(0, len(events)))
    given_trace = Trace(
        micro_batch=2,
        accumulation_steps=1,
        blocks=(Allocation(1, "activations", "forward", ""),) * blocks,
        events=tuple(events),
        marks=(Mark(place, "backward", 0, 0),),
    )
    ordered = with_frees_in_order(given_trace)
    assert with_frees_in_order(ordered) == ordered
    assert ordered.marks == given_trace.marks and ordered.blocks == given_trace.blocks
    assert [e if e >= 0 else None for e in ordered.events] == [
        e if e >= 0 else None for e in events
    ]
    for end in [place, *(i for i, event in enumerate(events) if event >= 0), len(events)]:
        assert sorted(ordered.events[:end]) == sorted(events[:end])
    runs = pairwise(range(len(events)))
    assert all(
        ordered.events[i] < ordered.events[j]
        for i, j in runs
        if events[i] < 0 and events[j] < 0 and j != place
    )
