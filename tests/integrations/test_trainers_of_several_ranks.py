from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import autobatch
from autobatch.errors import DoesNotFitError, WorkloadError
from autobatch.records.split import split
from autobatch.tuning.agreement import agreed
from tests.support.plans import example_plan
from tests.support.ranks import Ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    pytest.importorskip("torch.distributed")
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


def plan_below(ceiling: int) -> autobatch.Plan:
    planned = split(256, ceiling=ceiling, world_size=2)
    return replace(example_plan(), split=planned, ceiling=ceiling, ceiling_at_least=ceiling)


def agree(rank: int, ceilings: tuple[int, int]) -> int:
    return agreed(lambda: plan_below(ceilings[rank])).micro_batch


def fail(rank: int, failing: int) -> str:
    def make() -> autobatch.Plan:
        if rank == failing:
            raise DoesNotFitError("not even micro-batch 1 fits")
        return plan_below(64)

    try:
        agreed(make)
    except (DoesNotFitError, WorkloadError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def launched(rank: int, folder: str) -> None:
    """Set what `torchrun` sets."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "AUTOBATCH_CACHE_DIR": folder}


def fit(rank: int, folder: str) -> dict[str, Any]:
    """Tune and train under Lightning's DDP strategy; each rank imagines another card."""
    launched(rank, folder)
    from autobatch.integrations.lightning import AutobatchCallback
    from tests.integrations.test_lightning import Images, trainer

    card = autobatch.GpuSpec(name="card", capacity_bytes=(400, 26)[rank] * 2**20)
    module, callback = Images(), AutobatchCallback(target=256, gpu=card)
    trainer(Path(folder), callback, strategy="ddp", devices=2, max_epochs=1).fit(module)
    plan = callback.plan
    assert plan is not None
    return {
        "split": (plan.micro_batch, plan.accumulation_steps, plan.world_size),
        "sharding": plan.sharding,
        "gpu": plan.gpu.capacity_bytes,
        "updates": module.updates,
    }


def train(rank: int, folder: str) -> dict[str, Any]:
    """Tune and train transformers' Trainer in the same way."""
    launched(rank, folder)
    from autobatch.integrations.transformers import tune_trainer
    from tests.integrations.test_transformers import trainer

    run = trainer(Path(folder), ddp_backend="gloo", num_train_epochs=1)
    card = autobatch.GpuSpec(name="card", capacity_bytes=(400, 33)[rank] * 2**20)
    plan = tune_trainer(run, target=48, gpu=card)
    run.train()
    return {
        "split": (plan.micro_batch, plan.accumulation_steps, plan.world_size),
        "sharding": plan.sharding,
        "gpu": plan.gpu.capacity_bytes,
        "updates": run.updates,
        "weight": float(run.model.lm_head.weight.detach().sum()),
    }


def windows(rank: int, folder: str) -> list[float]:
    """Train under DDP with other samples on each rank; return how far each update is from true."""
    launched(rank, folder)
    from lightning.pytorch.strategies import DDPStrategy

    from autobatch.integrations.lightning import MeanOverWindow
    from tests.integrations.test_lightning import trainer
    from tests.integrations.test_lightning_window import Module, data

    def sizes(rank: int) -> list[int]:
        return [4, 4, 4, 4, (2, 1)[rank]]

    def samples(rank: int) -> list[Any]:
        return torch.arange(18 * rank, 18 * rank + sum(sizes(rank))).split(sizes(rank))

    class Rows(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([data(35)[places] for places in samples(rank)])

    wrong = []

    class Compared(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            chunk = slice(0, 3) if not wrong else slice(3, 5)
            places = torch.cat([torch.cat(samples(rank)[chunk]) for rank in range(2)])
            wanted = torch.autograd.grad(self.loss(*data(35)[places]), list(self.net.parameters()))
            pairs = zip(self.net.parameters(), wanted, strict=True)
            wrong.append(max(float((p.grad - g).abs().max()) for p, g in pairs))

        def configure_gradient_clipping(self, optimizer: Any, **options: Any) -> None:
            pass

    module = Compared(torch.utils.data.DataLoader(Rows(), batch_size=None))
    options = {"strategy": DDPStrategy(), "devices": 2, "max_epochs": 1}
    trainer(Path(folder), MeanOverWindow(), accumulate_grad_batches=3, **options).fit(module)
    return wrong


def scaled(rank: int, folder: str) -> tuple[Any, float]:
    """Train with a loss that leaves the count aside; return the setting and the gradient's norm."""
    launched(rank, folder)
    from autobatch.integrations.transformers import AutobatchCallback
    from tests.integrations import test_transformers_scale as tests

    found = []
    for size in (4, 1):
        options = {"ddp_backend": "gloo", "gradient_accumulation_steps": 4 // size}
        run, keep = tests.made(Path(folder), tests.OwnMean, tests.gpt2(), size=size, **options)
        run.add_callback(
            AutobatchCallback(replace(plan_below(size), split=split(8, ceiling=size, world_size=2)))
        )
        run.train()
        found.append(keep.updates[0])
    return run.loss_is_scaled_for_ga, float((found[0] - found[1]).abs().max())


def test_all_ranks_take_the_plan_of_the_one_that_holds_least(two: Ranks) -> None:
    assert agreed(lambda: plan_below(64)).micro_batch == 64  # without a process group
    assert two.run(agree, ceilings=(100, 16)) == [16, 16]
    assert two.run(agree, ceilings=(16, 100)) == [16, 16]


def test_no_rank_waits_for_one_that_failed(two: Ranks) -> None:
    own, others = two.run(fail, failing=0)
    assert own == "DoesNotFitError: not even micro-batch 1 fits"
    assert others.startswith("WorkloadError: rank 0 found no plan (DoesNotFitError: not even")


def test_a_distributed_trainer_makes_updates_of_the_target_over_all_ranks(
    two: Ranks, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    first, second = two.run(train, folder=str(tmp_path))
    assert first == second
    micro_batch, steps, ranks = first["split"]
    assert micro_batch * steps * ranks == 48 and steps > 1
    assert (first["sharding"], first["gpu"]) == ("ddp", 33 * 2**20)
    assert first["updates"] == [24, 24]  # of 96 samples, on each rank


def test_lightning_under_ddp_makes_updates_of_the_target_over_all_ranks(
    two: Ranks, tmp_path: Path
) -> None:
    pytest.importorskip("lightning")
    first, second = two.run(fit, folder=str(tmp_path))
    assert first == second
    micro_batch, steps, ranks = first["split"]
    assert micro_batch * steps * ranks == 256 and steps > 1
    assert (first["sharding"], first["gpu"]) == ("ddp", 26 * 2**20)
    assert first["updates"] == [128] * 4 + [38]  # of 1,100 samples, on each rank


def test_lightnings_windows_count_the_samples_of_all_ranks(two: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    for wrong in two.run(windows, folder=str(tmp_path)):
        assert len(wrong) == 2 and max(wrong) < 1e-14


def test_all_ranks_tell_trainer_the_same_of_an_own_loss(two: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    for setting, wrong in two.run(scaled, folder=str(tmp_path)):
        assert setting is False and wrong < 1e-14
