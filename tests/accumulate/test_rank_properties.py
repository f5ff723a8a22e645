"""Loops over ranks with anything left anywhere: the whole batch's update, or an error on each rank.

Every example runs in the same processes, with a wrapper of its own, and is over within seconds on
every rank: none waits for one that gave up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.random_loops import (
    AFTER,
    ANYWHERE,
    IN_MICRO_BATCHES,
    INSIDE,
    PLACES,
    Act,
    can_be_promised,
    wander,
)
from tests.support.ranks import Ranks

pytestmark = pytest.mark.slow

SECONDS = 30.0


class Pool:
    """Ranks that are started again after an example in which one of them hung or broke."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ranks: Ranks | None = None

    def run(self, **example: Any) -> list[str]:
        self._ranks = self._ranks or Ranks(self._size, seconds=SECONDS)
        try:
            return self._ranks.run(wander, **example)
        except Exception:
            self._ranks.stop()
            self._ranks = None
            raise

    def stop(self) -> None:
        if self._ranks is not None:
            self._ranks.stop()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def three() -> Iterator[Pool]:
    pool = Pool(3)
    yield pool
    pool.stop()


def acts(ranks: tuple[int | None, ...]) -> Any:
    """Draw what is left in a loop, by one of the ranks or (None) by all."""

    def built(what: str, rank: int | None, window: int, index: int, place: str) -> Act:
        if what in IN_MICRO_BATCHES and place not in INSIDE:
            place = INSIDE[index]
        return Act(what=what, rank=rank, window=window, index=index, place=place)

    return st.builds(
        built,
        what=st.sampled_from(ANYWHERE + IN_MICRO_BATCHES),
        rank=st.sampled_from(ranks),
        window=st.integers(0, 2),
        index=st.integers(0, 2),
        place=st.sampled_from(PLACES),
    )


def loops(ranks: int, *, alike: bool = False) -> Any:
    """Draw a whole example; with `alike`, all ranks do the same."""
    who: tuple[int | None, ...] = (None,) if alike else (*range(ranks), None)
    return st.fixed_dictionaries(
        {
            "acts": st.lists(acts(who), max_size=2),
            "counts": st.lists(st.integers(1, 14), min_size=ranks, max_size=ranks),
            "steps": st.integers(1, 3),
            "function": st.booleans(),
            "buffered": st.booleans(),
        }
    )


OPTIONS = st.sampled_from(
    [
        {},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"static_graph": True},
    ]
)


def check(pool: Pool, kind: str, loop: dict[str, Any], options: dict[str, Any]) -> None:
    left = [act for act in loop["acts"] if can_be_promised(act, options)]
    for said in pool.run(kind=kind, options=options, **{**loop, "acts": left}):
        assert not said


ALONE = (
    ("an error", "after the loop", 0),  # the others are in step, and add up losses
    ("leave the windows", "after the step", 0),  # they draw the next window
    ("leave the windows", "before the loop", 1),
    ("window.skip()", "before the loop", 0),
    ("window.skip()", "after the loop", 0),
    ("window.again()", "after the loop", 0),
    ("a backward of its own", "before the forward", 0),  # averages, and so do the others
    ("a backward of its own", "before the backward", 0),
    ("a shortage in the backward", "before the forward", 0),  # some buckets are averaged
    ("an evaluation", "before the forward", 1),  # buffers come before buckets are rebuilt
    ("an evaluation", "after the step", 0),
)
AVERAGING = ({}, {"static_graph": True}, {"find_unused_parameters": True})
"""Options by which ranks wait for each other in other ways, until the loop has averaged."""


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize(
    ("what", "place", "window", "options"),
    [(*act, options) for act in ALONE for options in AVERAGING[: 1 if act[1] in AFTER else None]],
)
def test_what_one_rank_does_alone_ends_on_both(
    pair: Pool, what: str, place: str, window: int, options: dict[str, Any], function: bool
) -> None:
    for index in (0, 1) if place in INSIDE else (0,):
        act = Act(what=what, rank=1, window=window, index=index, place=place)
        loop = {"acts": [act], "counts": [8, 8], "steps": 2, "function": function}
        check(pair, "ddp", {**loop, "buffered": True}, options)


def test_static_graph_that_learned_another_graph_is_refused(pair: Pool) -> None:
    """A backward pass past the wrapper before the first one; then PyTorch averages nothing."""
    act = Act(
        what="a backward past the wrapper", rank=None, window=0, index=0, place="before the loop"
    )
    for steps in (1, 2):
        loop = {"acts": [act], "counts": [8, 8], "steps": steps, "function": False}
        check(pair, "ddp", {**loop, "buffered": False}, {"static_graph": True})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(loop=loops(2), options=OPTIONS)
def test_two_ranks_have_the_update_of_the_whole_batch_or_raise(
    pair: Pool, loop: dict[str, Any], options: dict[str, Any]
) -> None:
    check(pair, "ddp", loop, options)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(loop=loops(3), options=OPTIONS)
def test_three_ranks_have_the_update_of_the_whole_batch_or_raise(
    three: Pool, loop: dict[str, Any], options: dict[str, Any]
) -> None:
    check(three, "ddp", loop, options)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(loop=loops(2, alike=True))
def test_shards_have_the_update_of_the_whole_batch_or_raise(
    pair: Pool, loop: dict[str, Any]
) -> None:
    """Of loops that all ranks run alike: others wait in the all-gathers of layers."""
    check(pair, "fsdp", loop, {})
