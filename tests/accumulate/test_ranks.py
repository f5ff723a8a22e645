"""Accumulation over two processes: DistributedDataParallel and FSDP2 on gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import rank_work
from tests.support.ranks import Ranks
from tests.support.shortages import STEPS

pytestmark = pytest.mark.slow


def assert_close(left: Any, right: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@settings(max_examples=12, deadline=None)
@given(
    first=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    second=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    steps=st.integers(1, 3),
)
def test_the_gradient_is_that_of_the_tokens_of_all_ranks(
    ranks: Ranks, kind: str, first: list[int], second: list[int], steps: int
) -> None:
    """Ragged windows, ranks with unequal numbers of tokens and of micro-batches."""
    counts = [[first[0] or 1, *first[1:]], [second[0] or 1, *second[1:]]]
    for result in ranks.run(rank_work.accumulate, kind=kind, counts=counts, steps=steps):
        assert_close(result["seen"], result["expected"], 1e-11)
        assert result["losses"] == pytest.approx(result["expected_losses"], rel=1e-11)


@pytest.mark.parametrize("sync", ["last", "each"])
def test_shards_reduce_in_the_last_micro_batch_or_in_each(ranks: Ranks, sync: str) -> None:
    results = ranks.run(
        rank_work.accumulate, kind="fsdp", counts=[[3, 5, 1], [12, 2, 7]], steps=3, sync=sync
    )
    for result in results:
        assert_close(result["seen"], result["expected"])


def test_unequal_token_counts_across_ranks(ranks: Ranks) -> None:
    """transformers #34242, torchtitan PR #2206: a mean of the ranks' own means."""
    counts = [[1], [12]]
    results = ranks.run(rank_work.accumulate, kind="ddp", counts=counts, steps=1)
    naive = ranks.run(rank_work.naive_ranks, counts=[1, 12])
    for result, wrong in zip(results, naive, strict=True):
        assert_close(result["seen"], result["expected"])
        off = (wrong["seen"][0] - result["expected"][0][0]).abs().max()
        assert off > 0.1 * result["expected"][0][0].abs().max()


def test_no_sync_covers_the_forward_pass(ranks: Ranks) -> None:
    """build-nanogpt PR #30: around backward alone it averages in every micro-batch."""
    ours = ranks.run(rank_work.count_averages, how="windows")[0]["buckets"]
    naive = ranks.run(rank_work.count_averages, how="backward only")[0]["buckets"]
    assert (ours, naive) == (3, 9)


def test_the_last_micro_batch_averages_not_the_one_before(ranks: Ranks) -> None:
    """FunASR PR #3472: off by one, the ranks step with different gradients."""
    ours = ranks.run(rank_work.count_averages, how="windows")
    naive = ranks.run(rank_work.count_averages, how="off by one")
    assert_close(ours[0]["seen"], ours[1]["seen"])
    with pytest.raises(AssertionError):
        assert_close(naive[0]["seen"], naive[1]["seen"])


@pytest.fixture(scope="module")
def undisturbed(ranks: Ranks) -> list[torch.Tensor]:
    results = ranks.run(rank_work.recover, place=None)
    assert_close(results[0]["parameters"], results[1]["parameters"], 0)
    return results[0]["parameters"]


@pytest.mark.parametrize("failing", [(1,), (0, 1)])
@pytest.mark.parametrize(("window", "index"), [(0, 0), (4, 0), (0, STEPS - 1)])
@pytest.mark.parametrize("place", ["inputs", "forward", "loss", "backward"])
def test_a_shortage_on_any_rank_is_recovered(
    ranks: Ranks,
    undisturbed: list[torch.Tensor],
    place: str,
    window: int,
    index: int,
    failing: tuple[int, ...],
) -> None:
    results = ranks.run(rank_work.recover, place=place, window=window, index=index, ranks=failing)
    for rank, result in enumerate(results):
        assert_close(result["parameters"], undisturbed)
        assert result["shortages"] == (rank in failing)
        assert len(result["said"]) == (rank in failing)
    assert results[0]["losses"] == results[1]["losses"]


@pytest.mark.parametrize("place", ["inputs", "forward", "loss", "backward"])
def test_repeated_shortages_of_the_averaging_micro_batch(
    ranks: Ranks, undisturbed: list[torch.Tensor], place: str
) -> None:
    results = ranks.run(
        rank_work.recover, place=place, window=3, index=STEPS - 1, times=2, ranks=(1,)
    )
    for result in results:
        assert_close(result["parameters"], undisturbed)


@pytest.mark.parametrize("place", ["inputs", "forward", "loss", "backward"])
def test_windows_of_a_single_micro_batch(ranks: Ranks, place: str) -> None:
    expected = ranks.run(rank_work.recover, place=None, steps=1)[0]["parameters"]
    for result in ranks.run(rank_work.recover, place=place, window=2, steps=1):
        assert_close(result["parameters"], expected)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_shortage_in_the_update_of_one_rank(ranks: Ranks, optimizer: str, index: int) -> None:
    expected = ranks.run(rank_work.recover, place=None, optimizer=optimizer)[0]["parameters"]
    results = ranks.run(
        rank_work.recover,
        place="step",
        window=4,
        index=index,
        ranks=(1,),
        optimizer=optimizer,
        guard_update=True,
    )
    for result in results:
        assert_close(result["parameters"], expected)
    assert [result["shortages"] for result in results] == [0, 1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_rank_whose_data_ends_first_waits_for_no_one(ranks: Ranks, kind: str) -> None:
    results = ranks.run(rank_work.uneven, kind=kind)
    assert [result["samples"] for result in results] == [[24, 14]] * 2
    assert results[0]["micro_batches"] == [(4, 4, 4), (2,)]
    assert results[1]["micro_batches"] == [(4, 4, 4), (4, 4, 4)]


def test_a_rank_without_data_is_an_error_on_all_of_them(ranks: Ranks) -> None:
    for said in ranks.run(rank_work.empty_loader):
        assert "the loader of a rank has no samples" in said


@pytest.mark.parametrize(
    ("given_model", "message"),
    [(False, "pass model=, the module that"), (True, "Linear averages no gradients")],
)
def test_a_model_that_averages_no_gradients_is_refused(
    ranks: Ranks, given_model: bool, message: str
) -> None:
    for said in ranks.run(rank_work.unknown_model, given=given_model):
        assert message in said


def test_ranks_take_the_plan_of_the_one_that_holds_least(ranks: Ranks) -> None:
    """Lightning #20994, #19789: no search under DDP, as ranks would not agree."""
    first, second = ranks.run(rank_work.tune, mib=(4000, 4000), target=20_000)
    assert first == second and not any("ranks" in warning for warning in first[2])
    ceiling = first[1]
    first, second = ranks.run(rank_work.tune, mib=(4000, 60), target=20_000)
    assert first == second
    assert max(map(max, first[0])) <= first[1] < ceiling
    assert sum(map(sum, first[0])) == 20_000
    assert any("the plan of rank 1, which holds least" in warning for warning in first[2])


def test_a_rank_that_finds_no_plan_ends_the_others_too(ranks: Ranks) -> None:
    first, second = ranks.run(rank_work.tune, mib=(4000, 4000), fails=(1,))
    assert second[0] == "WorkloadError"
    assert first[0] == "WorkloadError"
    assert "rank 1 found no plan (WorkloadError" in first[1]
    assert "no loss on this rank" in first[1]


def test_no_sync_does_nothing_under_fsdp2(ranks: Ranks) -> None:
    """What `no_sync` is for DDP, `set_requires_gradient_sync` is here."""
    assert ranks.run(rank_work.count_reductions, how="no_sync") == [3, 3]
    assert ranks.run(rank_work.count_reductions, how="windows") == [1, 1]
