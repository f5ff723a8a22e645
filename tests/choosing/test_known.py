"""What trials tell of those that have not run."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from autobatch.choosing.known import Known
from autobatch.records.sweep import Outcome, SweepTrial, front_of

PLAIN = {"checkpointing": "as it is"}
KEPT = {"checkpointing": "every block"}


def trial(
    number: int,
    settings: dict[str, str],
    size: int,
    seconds: float | None = None,
    reserved: int | None = None,
    outcome: Outcome = "finished",
) -> SweepTrial:
    return SweepTrial(
        number=number,
        settings=settings,
        micro_batch=size,
        accumulation_steps=1,
        outcome=outcome,
        seconds=seconds,
        reserved_bytes=reserved,
        executions=1,
    )


def why_not(trials: Iterable[SweepTrial], settings: dict[str, str], size: int) -> str | None:
    return Known(trials, margin=0.02).why_not(tuple(settings.items()), size)


def test_what_needs_at_least_as_much_as_one_that_does_not_fit_is_pruned() -> None:
    known = [trial(0, PLAIN, 16, reserved=9, outcome="does not fit")]
    assert why_not(known, PLAIN, 32) == "micro-batch 16 does not fit"
    assert why_not(known, PLAIN, 8) is None
    assert why_not(known, KEPT, 32) is None


def test_what_is_slower_and_larger_than_a_finished_one_is_pruned() -> None:
    known = [
        trial(0, PLAIN, 16, 1.0, 50),
        trial(1, KEPT, 16, 1.2, 60),
        trial(2, KEPT, 1, 2.0, 50),
    ]
    reason = why_not(known, KEPT, 4)
    assert reason is not None
    assert reason.startswith("trial 0 is faster (1 s, this at least 1.18 s) and no larger (50 B")


def test_what_may_be_faster_or_smaller_runs() -> None:
    corners = [trial(1, KEPT, 16, 1.2, 60), trial(2, KEPT, 1, 2.0, 50)]
    assert why_not([*corners, trial(0, PLAIN, 16, 1.0, 51)], KEPT, 4) is None
    assert why_not([*corners, trial(0, PLAIN, 16, 1.3, 50)], KEPT, 4) is None
    assert why_not([*corners, trial(0, PLAIN, 16, 1.19, 50)], KEPT, 4) is None  # in the margin
    assert why_not([corners[0], trial(0, PLAIN, 16, 1.0, 1)], KEPT, 4) is None  # no smaller one
    assert why_not([corners[1], trial(0, PLAIN, 16, 1.0, 1)], KEPT, 4) is None  # no larger one


def test_two_sizes_that_fail_give_a_combination_up_but_not_one() -> None:
    one, other = (trial(n, KEPT, n, outcome="failed") for n in (1, 8))
    assert why_not([one], KEPT, 4) is None
    assert why_not([one, other], KEPT, 4) == "micro-batches 1 and 8 failed"
    assert why_not([one, other, trial(3, KEPT, 2, 1.0, 1)], KEPT, 4) is None


def test_the_largest_that_fits_is_looked_for_first_and_then_the_smallest() -> None:
    sizes, key = [32, 16, 8, 4, 2, 1], tuple(PLAIN.items())

    def following(known: list[SweepTrial], guess: int | None = None) -> tuple[int, int]:
        done = {each.micro_batch for each in known}
        full = [each.micro_batch for each in known if each.outcome == "does not fit"]
        left = [n for n in sizes if n not in done and n < min(full, default=64)]
        return Known(known, 0.0).next_size(key, left, guess)

    large = trial(0, PLAIN, 32, reserved=9, outcome="does not fit")
    assert following([]) == (0, 32)
    assert following([], guess=8) == (0, 8)
    assert following([trial(0, PLAIN, 8, 1.0, 1)], guess=8) == (0, 16)
    assert following([large]) == (0, 4)
    assert following([large, trial(1, PLAIN, 16, 1.0, 1)]) == (1, 1)
    both = [large, trial(1, PLAIN, 16, 1.0, 1), trial(2, PLAIN, 1, 2.0, 1)]
    assert following(both) == (2, 4)


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)),
        min_size=1,
        max_size=5,
    )
)
def test_pruning_never_takes_a_point_of_the_front_away(
    shapes: list[tuple[int, int, int, int]],
) -> None:
    """Combinations whose time falls and whose memory grows with the size, as it is in training."""
    sizes = (16, 8, 4, 2, 1)
    everything = [
        trial(
            place * len(sizes) + at,
            {"lever": str(place)},
            size,
            base + step / size,
            fixed + slope * size,
            "finished" if fixed + slope * size < 60 else "does not fit",
        )
        for place, (base, step, fixed, slope) in enumerate(shapes)
        for at, size in enumerate(sizes)
    ]
    by_key = {(tuple(t.settings.items()), t.micro_batch): t for t in everything}
    ran: list[SweepTrial] = []
    pruned: set[object] = set()
    while True:
        known = Known(ran, margin=0.0)
        done = {(tuple(each.settings.items()), each.micro_batch) for each in ran}
        pruned |= {key for key in by_key.keys() - done if known.why_not(*key)}
        options = []
        for place in range(len(shapes)):
            combination = (("lever", str(place)),)
            left = [n for n in sizes if (combination, n) not in done | pruned]
            if left:
                stage, size = known.next_size(combination, left, known.guess())
                options.append((stage, place, (combination, size)))
        if not options:
            break
        ran.append(by_key[min(options)[2]])
    finished = [each for each in everything if each.outcome == "finished"]
    figures = {(each.seconds, each.reserved_bytes) for each in front_of(finished)}
    fitting = [each for each in ran if each.outcome == "finished"]
    assert {(each.seconds, each.reserved_bytes) for each in front_of(fitting)} == figures


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=12))
def test_the_front_holds_what_no_other_is_at_least_as_good_as(pairs: list[tuple[int, int]]) -> None:
    trials = [trial(n, PLAIN, 1, float(s), b) for n, (s, b) in enumerate(pairs)]
    expected = {
        (s, b)
        for s, b in pairs
        if not any(t <= s and c <= b and (t, c) != (s, b) for t, c in pairs)
    }
    front = front_of(trials)
    assert {(each.seconds, each.reserved_bytes) for each in front} == expected
    assert len(front) == len(expected)
    assert [each.seconds for each in front] == sorted(s for s, _ in expected)
