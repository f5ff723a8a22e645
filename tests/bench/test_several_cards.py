"""Several cards: each rank a process with a card of its own, over NCCL."""

from __future__ import annotations

import json

import pytest

from tests.bench.children import needs_bench, run

pytestmark = needs_bench

LAYER = 4 * (1024 * 1024 + 1024)
RANKS = 2


@pytest.mark.slow
def test_ranks_meet_train_under_ddp_and_fsdp2_and_agree_on_a_plan() -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS]
    program = [*torchrun, "-m", "tests.bench.programs.ranks"]
    found = json.loads(run(program, cards=RANKS, capacity="4GiB").splitlines()[-1])
    assert found["devices"] == RANKS
    assert (found["gathered"], found["sent"]) == ([10, 11], 21)
    assert found["total"] == 3.0
    # parameters, gradients (in DDP's buckets as well) and two states of each
    assert 4 * 4 * LAYER < found["ddp"] < 9 * 4 * LAYER
    shards = 4 * 4 * LAYER // RANKS
    assert shards < found["fsdp2"] < shards + 4 * 2 * LAYER + found["ddp"]
    first, second = found["plans"]
    assert first == second
    assert any("this is the plan of rank 1, which holds least" in w for w in first["warnings"])
    first, second = found["windows"]
    assert first[:2] == ["(4, 2, 2, 4, 4)", "(4, 4, 4, 4)"] and second[:2] == ["(4, 4, 4, 4)"] * 2
    assert first[-1].startswith("a micro-batch of one sample runs out of memory")
    assert second[-1].startswith("rank 0 cannot go on") and first[-1] in second[-1]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("where", ["beside", "in_buckets"])
def test_gradients_beside_the_buckets_of_ddp_and_in_them_are_foretold(
    where: str, steps: int
) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS]
    program = [*torchrun, "-m", "tests.bench.programs.buckets", where, steps]
    found = json.loads(run(program, cards=RANKS, capacity="8GiB").splitlines()[-1])
    assert found["promised"] == pytest.approx(found["ran"], rel=0.01)
