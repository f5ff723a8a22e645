import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autobatch.errors import UsageError
from autobatch.records.split import split, uniform_alternatives

targets = st.integers(1, 5000)
ceilings = st.integers(1, 300)
worlds = st.integers(1, 16)


def divisible(target, ceiling, world_size):
    return target >= world_size and (ceiling > 1 or target % world_size == 0)


def fewest_steps(target, ceiling, world_size):
    return -(-target // (world_size * ceiling))


@given(targets, ceilings, worlds)
def test_every_split_is_exact_and_fits_with_sizes_that_differ_by_at_most_one(
    target, ceiling, world_size
):
    assume(divisible(target, ceiling, world_size))
    planned = split(target, ceiling=ceiling, world_size=world_size)
    sizes = [size for window in planned.windows for size in window]
    totals = [sum(window) for window in planned.windows]
    assert planned.effective_batch == sum(sizes) == target
    assert planned.micro_batch == max(sizes) <= ceiling
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert max(totals) - min(totals) <= 1
    assert {len(window) for window in planned.windows} == {planned.accumulation_steps}
    assert planned.world_size == world_size
    assert planned.uniform == (len(set(sizes)) == 1)


@given(targets, ceilings, worlds)
def test_the_steps_are_the_fewest_uniform_ones_within_twice_the_minimum_else_the_minimum(
    target, ceiling, world_size
):
    assume(divisible(target, ceiling, world_size))
    planned = split(target, ceiling=ceiling, world_size=world_size)
    fewest = fewest_steps(target, ceiling, world_size)
    uniform = [k for k in range(fewest, 2 * fewest + 1) if target % (k * world_size) == 0]
    assert planned.accumulation_steps == min(uniform, default=fewest)


@pytest.mark.parametrize(
    ("target", "ceiling", "world_size", "windows"),
    [
        (256, 100, 1, ((64, 64, 64, 64),)),
        (256, 256, 1, ((256,),)),
        (256, 1000, 4, ((64,), (64,), (64,), (64,))),
        (257, 100, 1, ((86, 86, 85),)),
        (7, 2, 2, ((2, 2), (2, 1))),
    ],
)
def test_known_targets_are_divided_as_people_expect(target, ceiling, world_size, windows):
    assert split(target, ceiling=ceiling, world_size=world_size).windows == windows


@pytest.mark.parametrize("wrong", [0, -8, True, 2.0, "64", None])
def test_a_number_that_is_no_positive_integer_is_a_usage_error(wrong):
    for numbers in ((wrong, 8, 1), (64, wrong, 1), (64, 8, wrong)):
        with pytest.raises(UsageError, match="give a whole number of at least 1"):
            split(numbers[0], ceiling=numbers[1], world_size=numbers[2])


def test_a_target_below_the_world_size_is_a_usage_error_with_both_numbers():
    with pytest.raises(UsageError, match=r"effective batch of 3 .* 8 GPUs.* at least 8"):
        split(3, ceiling=10, world_size=8)


def test_a_target_that_single_samples_cannot_share_evenly_is_a_usage_error_with_the_neighbours():
    with pytest.raises(UsageError, match=r"use a multiple of 2, such as 4 or 6"):
        split(5, ceiling=1, world_size=2)


def test_an_absurd_number_of_micro_batches_is_refused_instead_of_filling_the_memory():
    with pytest.raises(UsageError, match="use a smaller target"):
        split(10**15, ceiling=3)


@given(targets, st.integers(2, 300), worlds)
def test_the_alternatives_are_the_nearest_uniform_splits_on_both_sides(target, ceiling, world_size):
    assume(target >= world_size)
    planned = split(target, ceiling=ceiling, world_size=world_size)
    alternatives = uniform_alternatives(planned, ceiling=ceiling)
    assert all(a.uniform and a.micro_batch <= ceiling for a in alternatives)
    if planned.uniform:
        assert alternatives == (planned,)
    else:
        below, above = (a.target for a in alternatives)
        assert below < target < above
        for between in range(below + 1, above):
            assert not split(between, ceiling=ceiling, world_size=world_size).uniform


def test_only_a_larger_batch_is_offered_where_no_smaller_one_is_uniform():
    ragged = split(3, ceiling=2, world_size=2)
    assert [a.target for a in uniform_alternatives(ragged, ceiling=2)] == [2, 4]
    lonely = split(17, ceiling=4, world_size=16)
    assert [a.target for a in uniform_alternatives(lonely, ceiling=4)] == [16, 32]
