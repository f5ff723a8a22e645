"""Loops over two processes: right, or refused on every rank, and no rank waits for another."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.support import rank_loops
from tests.support.ranks import Ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("bucket_views", [False, True])
@pytest.mark.parametrize("loop", ["whole", "one by one", "added up"])
def test_losses_of_one_micro_batch_are_averaged_however_they_come(
    ranks: Ranks, loop: str, bucket_views: bool
) -> None:
    for result in ranks.run(
        rank_loops.train, loop=loop, gradient_as_bucket_view=bucket_views, evaluation=True
    ):
        assert result["off"] < 1e-12


@pytest.mark.parametrize("loop", ["bypassed", "two after two", "after a look"])
def test_a_backward_pass_that_is_not_averaged_is_refused(ranks: Ranks, loop: str) -> None:
    for result in ranks.run(rank_loops.train, loop=loop):
        assert "would not be averaged over the ranks" in result["refused"]


@pytest.mark.parametrize("function", [False, True])
@pytest.mark.parametrize("bucket_views", [False, True])
def test_a_static_graph_is_learned_in_the_first_window(
    ranks: Ranks, bucket_views: bool, function: bool
) -> None:
    for result in ranks.run(
        rank_loops.train,
        loop="whole",
        static_graph=True,
        gradient_as_bucket_view=bucket_views,
        function=function,
    ):
        assert result["off"] < 1e-12


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    "skipped",
    [
        {0: (1,)},
        {0: (2,)},  # the micro-batch that averages
        {0: (2,), 1: (2, 3)},
        {0: (0, 1, 2)},
        {0: (3, 4, 5), 1: (3, 4, 5)},
    ],
)
def test_micro_batches_are_skipped_on_one_rank(
    ranks: Ranks, skipped: dict[int, tuple[int, ...]], called: bool
) -> None:
    for result in ranks.run(rank_loops.skip, skipped=skipped, called=called):
        assert result["off"] < 1e-12
        gone = [sum(at // 3 == window for each in skipped.values() for at in each)
                for window in (0, 1)]  # fmt: skip
        assert result["samples"] == [24 - 4 * count for count in gone]
        losses = [loss for loss in result["losses"] if not math.isnan(loss)]
        assert losses == pytest.approx(result["expected"], rel=1e-12)


REASONS: dict[str, str] = {
    "shortage before": "DoesNotFitError: a micro-batch of one sample",
    "shortage after": "DoesNotFitError: a micro-batch of one sample",
    "bug before": "KeyError: 'labels'",
    "bug after": "KeyError: 'labels'",
    "weight": "UsageError: weight(batch) gives -1.0",
    "update": "DoesNotFitError: the optimizer's update",
    "loader": "OSError: the disk is gone",
}


@pytest.mark.parametrize("place", [0, 2, 3])
@pytest.mark.parametrize("why", sorted(REASONS))
def test_no_rank_waits_for_one_that_gave_up(ranks: Ranks, why: str, place: int) -> None:
    """Whatever ends it, in whichever micro-batch; the others say whose reason it was."""
    first, second = ranks.run(rank_loops.give_up, why=why, place=place)
    assert first["said"].startswith(REASONS[why])
    assert second["said"].startswith("OtherRankError: rank 0 cannot go on, so this one ends too")
    assert REASONS[why] in second["said"]
    assert max(first["seconds"], second["seconds"]) < 20


@pytest.mark.parametrize("why", ["weight", "update", "loader"])
def test_ranks_of_shards_do_not_wait_outside_of_a_pass(ranks: Ranks, why: str) -> None:
    first, second = ranks.run(rank_loops.give_up, why=why, place=0, kind="fsdp")
    assert first["said"].startswith(REASONS[why]) and REASONS[why] in second["said"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("ignored", "1 trained parameters (module.0.weight) are not averaged over the ranks"),
        ("of a loss", "2 trained parameters (none of them in model=) are not averaged"),
        ("one layer sharded", "2 trained parameters (0.weight, 0.bias) are not averaged"),
        ("frozen", "accepted"),
    ],
)
def test_parameters_that_no_wrapper_averages_are_refused(ranks: Ranks, how: str, said: str) -> None:
    for result in ranks.run(rank_loops.partly, how=how):
        assert said in result


def test_the_norm_under_fsdp2_is_that_of_the_whole_gradient(ranks: Ranks) -> None:
    result: dict[str, Any]
    for result in ranks.run(rank_loops.norm):
        assert result["said"] == result["expected"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no_sync", "take no_sync() away from around the windows"),
        ("unfrozen before", "4 parameters require gradients, of which"),
        ("unfrozen between", "2 trained parameters (module.0.weight, module.0.bias) are not"),
        ("group added", "2 trained parameters (none of them in model=) are not averaged"),
        ("frozen", "did not reach all parameters that DistributedDataParallel averages"),
        ("plain", "went on"),
    ],
)
def test_what_keeps_ddp_from_averaging_is_refused_on_every_rank(
    ranks: Ranks, how: str, said: str
) -> None:
    for result in ranks.run(rank_loops.around, how=how):
        assert said in result


@pytest.mark.parametrize("how", ["one rank breaks", "one rank breaks late", "no backward"])
def test_a_loop_that_one_rank_leaves_ends_on_all_of_them(ranks: Ranks, how: str) -> None:
    """Before its average and after it, and where it forgets a backward pass."""
    first, second = ranks.run(rank_loops.around, how=how)
    forgot = how == "no backward"
    assert ("had no window.backward(loss)" in first) if forgot else first == "left"
    assert "rank 0 cannot go on" in second
    assert ("had no window.backward" if forgot else "it left window 0") in second


@pytest.mark.parametrize("how", ["plain", "settings", "left"])
def test_shards_reduce_whatever_was_set_or_left_behind(ranks: Ranks, how: str) -> None:
    for result in ranks.run(rank_loops.shards, how=how):
        assert result.get("off", 1) < 1e-12, result


def test_a_divide_factor_of_the_users_own_is_refused(ranks: Ranks) -> None:
    for result in ranks.run(rank_loops.shards, how="divided"):
        assert "set_gradient_divide_factor" in result["refused"]
