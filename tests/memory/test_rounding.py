"""Counts that are rounded up are the same in a run and in what foretells it."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.memory.alignment import Misaligned
from autobatch.memory.interpolation import nodes_for
from autobatch.memory.rounding import Rounding, part_of, rounded_up, roundings
from autobatch.memory.trace import Allocation, Mark, Trace
from autobatch.memory.trace_model import TraceModel


@given(st.integers(1, 10**9), st.integers(1, 512), st.integers(1, 512))
def test_a_share_that_is_a_float_gives_the_count_that_its_fraction_gives(elements, one, other):
    few, many = sorted((one, other))
    assert rounded_up(part_of(elements, few / many)) == -(-elements * few // many)


@given(st.integers(0, 10**6), st.integers(10**7, 10**12))
def test_a_share_that_a_count_was_made_of_gives_the_count_again(count, elements):
    assert rounded_up(part_of(elements, count / elements)) == count


def traces_of(rows, *ways):
    """Return a function from the micro-batch to a trace whose sizes follow counts.

    Each row is bytes that stay, bytes of each sample, and bytes of each of what is counted; ways
    are the parts that are rounded up, of which sizes follow the first.
    """

    def trace_at(n):
        parts = tuple(dict.fromkeys(base + slope * n for base, slope in ways))
        count = math.ceil(parts[0]) if parts else 0
        blocks = tuple(
            Allocation(stay + sample * n + each * count, "activations", "forward", "mm")
            for stay, sample, each in rows
        )
        return Trace(
            micro_batch=n,
            accumulation_steps=1,
            blocks=blocks,
            events=tuple(range(len(blocks))),
            marks=(Mark(0, "forward", 0, 0),),
            parts=parts,
        )

    return trace_at


bytes_ = st.integers(0, 10**6)
rows_ = st.lists(st.tuples(bytes_, bytes_, bytes_), min_size=1, max_size=6)


@given(rows_, st.integers(1, 12), st.integers(1, 64), st.integers(0, 40), st.integers(1, 10**5))
def test_sizes_that_follow_a_count_are_exact_at_every_micro_batch(rows, chosen, experts, more, n):
    trace_at = traces_of(rows, (Fraction(more, experts), Fraction(chosen, experts)))
    nodes = nodes_for([trace_at(2), trace_at(3)], 10**4)
    model = TraceModel.fit([trace_at(node) for node in nodes])
    assert model.trace(n) == trace_at(n)
    assert model.difference(trace_at(n)) is None
    assert (model.degree, model.quadratic_share(9)) == (1, 0.0)
    assert len(nodes) == (2 if chosen % experts == 0 else 3)


def test_a_model_is_fitted_where_there_are_two_of_what_is_counted():
    trace_at = traces_of([(0, 0, 8)], (Fraction(0), Fraction(1, 8)))
    nodes = nodes_for([trace_at(2), trace_at(3)], 100)
    assert nodes == (9, 10, 17)  # counts of 2, 2 and 3
    with pytest.raises(Misaligned, match=r"up to 16 show"):
        nodes_for([trace_at(2), trace_at(3)], 16)


def test_two_micro_batches_do_not_show_how_a_count_is_rounded_up():
    trace_at = traces_of([(0, 0, 8)], (Fraction(0), Fraction(2, 4)))
    with pytest.raises(Misaligned, match="rounded up"):
        TraceModel.fit([trace_at(2), trace_at(3)])
    with pytest.raises(Misaligned, match="rounded up"):
        TraceModel.fit([trace_at(n) for n in (2, 3, 5)][:2])
    with pytest.raises(Misaligned, match="rounded up"):  # 4 and 6 are as 2 is
        TraceModel.fit([trace_at(n) for n in (2, 4, 6)])


def test_counts_that_differ_by_a_line_are_one_and_others_have_no_model():
    half = (Fraction(0), Fraction(1, 2))
    trace_at = traces_of(
        [(0, 4, 8)], half, (Fraction(7), Fraction(5, 2)), (Fraction(1), Fraction(3))
    )
    nodes = nodes_for([trace_at(2), trace_at(3)], 100)
    assert TraceModel.fit([trace_at(n) for n in nodes]).trace(77) == trace_at(77)
    trace_at = traces_of([(0, 4, 8)], half, (Fraction(0), Fraction(1, 3)))
    with pytest.raises(Misaligned, match="2 counts are rounded up"):
        nodes_for([trace_at(2), trace_at(3)], 100)


def test_parts_that_follow_no_line_or_are_others_have_no_model():
    trace_at = traces_of([(0, 0, 8)], (Fraction(0), Fraction(2, 4)))
    more = replace(trace_at(3), parts=(*trace_at(3).parts, Fraction(1, 3)))
    with pytest.raises(Misaligned):
        nodes_for([trace_at(2), more], 100)
    bent = [[Fraction(n * n, 3)] for n in (2, 3, 4)]
    with pytest.raises(ValueError, match="no line"):
        roundings([2, 3, 4], bent)
    assert roundings([2, 3], bent[:2]) == [Rounding(Fraction(-2), Fraction(5, 3))]
