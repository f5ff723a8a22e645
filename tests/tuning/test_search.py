from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.tuning.search import CeilingSearch

MIB = 2**20


def run(search, oracle):
    """Answer every ask with oracle(size) -> (fits, peak_bytes); return the sizes asked."""
    asked = []
    while (size := search.ask()) is not None:
        assert size not in asked
        fits, peak_bytes = oracle(size)
        search.tell(size, fits=fits, peak_bytes=peak_bytes)
        asked.append(size)
        assert len(asked) < 200
    return asked


def affine(base, slope, budget):
    return lambda n: (base + slope * n <= budget, base + slope * n)


@given(st.integers(1, 10**6), st.data())
def test_the_ceiling_of_any_monotone_rule_is_exact_after_logarithmically_many_asks(limit, data):
    ceiling = data.draw(st.integers(0, limit))
    search = CeilingSearch(limit=limit, budget_bytes=10**9)
    asked = run(search, lambda n: (n <= ceiling, None))
    assert search.ceiling == ceiling
    assert search.limit_reached == (ceiling == limit)
    assert len(asked) <= 2 * log2(limit + 1) + 2


@given(
    limit=st.integers(1, 10**5),
    power=st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0, 3.0]),
    base=st.integers(0, 10**9),
    slope=st.integers(1, 10**6),
    told_above=st.booleans(),
)
def test_peaks_of_any_monotone_shape_never_mislead_the_search_for_long(
    limit, power, base, slope, told_above
):
    budget = 2 * 10**9

    def oracle(n):
        peak = base + int(slope * n**power)
        return peak <= budget, peak if peak <= budget or told_above else None

    search = CeilingSearch(limit=limit, budget_bytes=budget)
    asked = run(search, oracle)
    ceiling = search.ceiling
    assert ceiling == 0 or oracle(ceiling)[0]
    assert ceiling == limit or not oracle(ceiling + 1)[0]
    assert len(asked) <= 2 * log2(limit + 1) + 14


@given(
    limit=st.integers(1, 2000),
    peaks=st.integers(0, 2**32).map(lambda seed: lambda n: hash((seed, n)) % 10**9),
    look_above=st.integers(0, 3),
)
def test_nonsense_answers_still_end_at_a_size_that_fits_below_one_that_does_not(
    limit, peaks, look_above
):
    told = {}

    def oracle(n):
        told[n] = peaks(n) <= 5 * 10**8
        return told[n], peaks(n)

    search = CeilingSearch(limit=limit, budget_bytes=5 * 10**8, look_above=look_above)
    run(search, oracle)
    ceiling = search.ceiling
    assert ceiling == max((n for n, fits in told.items() if fits), default=0)
    for above in range(ceiling + 1, min(ceiling + 1 + look_above, limit) + 1):
        assert told[above] is False


@given(
    limit=st.integers(1, 768),
    base=st.integers(0, 60_000 * MIB),
    slope=st.integers(1, 4096 * MIB),
    seeds=st.sampled_from([(), (2, 3)]),
)
def test_affine_peaks_take_two_sizes_and_then_only_the_ceiling_and_the_next_size(
    limit, base, slope, seeds
):
    budget = 80_000 * MIB
    search = CeilingSearch(limit=limit, budget_bytes=budget)
    oracle = affine(base, slope, budget)
    for size in (n for n in seeds if n <= limit):
        fits, peak_bytes = oracle(size)
        search.tell(size, fits=fits, peak_bytes=peak_bytes)
    asked = run(search, oracle)
    assert search.ceiling == min(limit, max(0, (budget - base) // slope))
    assert len(asked) <= (2 if seeds else 4)


@given(
    base=st.integers(8 * MIB, 60_000 * MIB),
    slope=st.integers(16 * MIB, 4096 * MIB),
    seeds=st.sampled_from([(), (2, 3)]),
    noise=st.integers(0, 2**32).map(lambda seed: lambda n: hash((seed, n)) % (4 * MIB) - 2 * MIB),
    told_above=st.booleans(),
)
def test_affine_peaks_that_segments_round_by_2_mib_take_few_asks(
    base, slope, seeds, noise, told_above
):
    budget = 80_000 * MIB

    def oracle(n):
        peak = base + slope * n + noise(n)
        return peak <= budget, peak if peak <= budget or told_above else None

    search = CeilingSearch(limit=65_536, budget_bytes=budget)
    for size in seeds:
        fits, peak_bytes = oracle(size)
        search.tell(size, fits=fits, peak_bytes=peak_bytes)
    asked = run(search, oracle)
    assert search.ceiling == 0 or oracle(search.ceiling)[0]
    assert not oracle(search.ceiling + 1)[0]
    assert len(asked) <= (6 if seeds else 8)


@given(st.data())
def test_answers_told_in_between_are_used_and_never_break_the_search(data):
    search = CeilingSearch(limit=500, budget_bytes=1000)
    oracle = affine(100, 7, 1000)
    for _ in range(data.draw(st.integers(0, 8))):
        size = data.draw(st.one_of(st.integers(1, 500), st.just(search.ask())))
        if size is not None:
            told_peak = data.draw(st.booleans())
            fits, peak_bytes = oracle(size)
            search.tell(size, fits=fits, peak_bytes=peak_bytes if told_peak else None)
    run(search, oracle)
    assert search.ceiling == 128


def test_a_memory_without_constant_part_is_never_overrun_before_the_last_ask():
    search = CeilingSearch(limit=4096, budget_bytes=1000)
    oracle = affine(0, 3, 1000)
    asked = run(search, oracle)
    assert [n for n in asked if not oracle(n)[0]] == asked[-1:] == [334]


def test_the_ceiling_is_zero_when_not_even_one_sample_fits():
    search = CeilingSearch(limit=64, budget_bytes=10)
    asked = run(search, affine(100, 1, 10))
    assert (search.ceiling, search.limit_reached, 1 in asked) == (0, False, True)


def test_the_limit_is_reached_when_everything_fits():
    search = CeilingSearch(limit=64, budget_bytes=10**6)
    run(search, affine(100, 1, 10**6))
    assert (search.ceiling, search.limit_reached) == (64, True)


def test_an_unanswered_ask_is_repeated():
    search = CeilingSearch(limit=64, budget_bytes=100)
    assert search.ask() == search.ask() == 2


def test_a_larger_size_that_fits_overrules_a_smaller_one_that_did_not():
    search = CeilingSearch(limit=100, budget_bytes=100)
    search.tell(8, fits=False, peak_bytes=None)
    search.tell(20, fits=True, peak_bytes=90)
    search.tell(21, fits=False, peak_bytes=None)
    assert search.ask() is None
    assert search.ceiling == 20


def test_looking_above_finds_a_size_that_fits_beyond_a_gap():
    def oracle(n):
        return n <= 40 or n == 43, n

    plain = CeilingSearch(limit=100, budget_bytes=40)
    run(plain, oracle)
    thorough = CeilingSearch(limit=100, budget_bytes=40, look_above=2)
    asked = run(thorough, oracle)
    assert (plain.ceiling, thorough.ceiling) == (40, 43)
    assert {44, 45, 46} <= set(asked)


def test_sizes_outside_the_range_and_an_empty_range_are_refused():
    with pytest.raises(ValueError, match="limit is 0"):
        CeilingSearch(limit=0, budget_bytes=1)
    search = CeilingSearch(limit=8, budget_bytes=1)
    for size in (0, 9):
        with pytest.raises(ValueError, match="outside the search range 1 to 8"):
            search.tell(size, fits=True, peak_bytes=None)
