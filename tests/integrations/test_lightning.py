from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.errors import DoesNotFitError, UsageError, WorkloadError
from autobatch.records.split import Split, split
from tests.support.plans import example_plan, ragged_plan

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from autobatch.integrations.lightning import AutobatchCallback, MeanOverWindow  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),  # trainers here are on the CPU
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]

CARD = autobatch.GpuSpec(name="tiny-card", capacity_bytes=26 * 2**20)
LARGER = autobatch.GpuSpec(name="larger-card", capacity_bytes=300 * 2**20)
SAMPLES = 1_100
EPOCH = [256] * 4 + [76]  # samples of its updates


class Images(lightning.LightningModule):
    """Counts the samples of each update, in one linear schedule over all of them."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10)
        )
        self.waiting = 0
        self.updates: list[int] = []
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        self.log("count", float(len(images)))
        self.waiting += len(images)
        return F.cross_entropy(self.net(images + torch.zeros(1, device=self.device)), labels)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.updates.append(self.waiting)
        self.waiting = 0
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        adamw = torch.optim.AdamW(self.parameters(), lr=1.0)
        steps = self.trainer.estimated_stepping_batches
        decay = torch.optim.lr_scheduler.LinearLR(adamw, 1.0, 0.0, total_iters=steps)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def train_dataloader(self) -> Any:
        data = TensorDataset(torch.zeros(SAMPLES, 1, 8, 8), torch.zeros(SAMPLES, dtype=torch.int64))
        return DataLoader(data, batch_size=self.batch_size, shuffle=True)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"max_epochs": 2, "enable_checkpointing": False, **options},
    )


def test_updates_get_the_target_and_what_an_epoch_leaves_and_the_schedule_ends_with_the_last(
    tmp_path: Path,
) -> None:
    module, callback = Images(), AutobatchCallback(target=256, gpu=CARD)
    run = trainer(tmp_path, callback, gradient_clip_val=1.0)
    run.fit(module)
    plan = callback.plan
    assert plan is not None and plan.accumulation_steps > 1
    assert (plan.target, plan.effective_batch, plan.gpu.name) == (256, 256, "tiny-card")
    assert (module.batch_size, run.accumulate_grad_batches) == (
        plan.micro_batch,
        plan.accumulation_steps,
    )
    assert (plan.model.optimizer, plan.model.clip_norm) == ("AdamW", 1.0)
    assert module.updates == EPOCH * 2
    assert module.rates == pytest.approx([1 - step / 10 for step in range(10)])
    assert run.limit_train_batches == 1.0


def test_the_plan_by_itself_gives_the_same_updates(tmp_path: Path) -> None:
    plan = replace(
        example_plan(),
        split=split(256, ceiling=100),
        model=replace(example_plan().model, autocast=None),
    )
    settings = plan.to_lightning(samples=SAMPLES)
    assert settings.trainer.pop("devices") == 1
    run = trainer(tmp_path, max_epochs=1, **settings.trainer)
    module = Images()
    data = module.train_dataloader().dataset
    run.fit(module, DataLoader(data, shuffle=True, **settings.dataloader))
    assert module.updates == [256] * 4


def test_settings_name_precision_clipping_and_strategy_as_lightning_does() -> None:
    ranks = replace(example_plan(), split=Split(target=256, windows=((64,) * 2,) * 2))
    made = replace(ranks, sharding="ddp").to_lightning().trainer
    assert made == {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 1.0,
        "gradient_clip_algorithm": "norm",
        "precision": "bf16-mixed",
        "devices": 2,
        "strategy": "ddp",
    }
    with pytest.raises(UsageError, match="100 samples do not fill one effective batch of 256"):
        example_plan().to_lightning(samples=100)
    with pytest.raises(UsageError, match="one size"):
        ragged_plan(257, ((86, 86, 85),)).to_lightning()


def test_a_run_that_resumes_takes_the_sizes_of_its_checkpoint(tmp_path: Path) -> None:
    first = AutobatchCallback(target=256, gpu=CARD)
    run = trainer(tmp_path, first, max_epochs=1)
    run.fit(Images())
    checkpoint = tmp_path / "a.ckpt"
    run.save_checkpoint(checkpoint)

    # a card that would give other sizes
    again, module = AutobatchCallback(target=256, gpu=LARGER), Images()
    run = trainer(tmp_path, again)
    run.fit(module, ckpt_path=checkpoint, weights_only=True)
    assert again.plan == first.plan
    assert module.updates == EPOCH

    # known beforehand, nothing is probed at all: there is no CUDA device to probe on
    known = AutobatchCallback(target=256, gpu="cuda:7")
    run = trainer(tmp_path, known)
    run.ckpt_path = str(checkpoint)
    run.fit(Images(), weights_only=True)
    assert known.plan == first.plan

    other = AutobatchCallback(target=128, gpu=CARD)
    with pytest.raises(UsageError, match=r"target of 256 on 1 ranks.* asks for 128"):
        trainer(tmp_path, other).fit(Images(), ckpt_path=checkpoint, weights_only=True)


def test_where_nothing_fits_the_module_and_trainer_are_as_before(tmp_path: Path) -> None:
    module = Images()
    weights, modes = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    smallest = autobatch.GpuSpec(name="smallest", capacity_bytes=2**20)
    run = trainer(tmp_path, AutobatchCallback(target=256, gpu=smallest))
    state = torch.random.get_rng_state()
    with pytest.raises(DoesNotFitError):
        run.fit(module)
    assert (module.batch_size, run.accumulate_grad_batches) == (8, 1)
    assert run.limit_train_batches == 1.0 and run.train_dataloader is None
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in module.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_target_that_needs_several_sizes_is_replaced_only_when_asked(tmp_path: Path) -> None:
    prime = 251
    with pytest.raises(UsageError, match=r"251 needs sizes .* nearest=True"):
        trainer(tmp_path, AutobatchCallback(target=prime, gpu=CARD)).fit(Images())
    module, callback = Images(), AutobatchCallback(target=prime, gpu=CARD, nearest=True)
    trainer(tmp_path, callback, max_epochs=1).fit(module)
    assert callback.plan is not None
    taken = callback.plan.target
    assert taken in (250, 252)
    assert module.updates == [taken] * (SAMPLES // taken) + [SAMPLES % taken]
    assert any(f"{taken} in place of the 251" in note for note in callback.plan.notes)


def test_a_sample_of_ones_own_is_probed(tmp_path: Path) -> None:
    few = TensorDataset(torch.zeros(300, 1, 8, 8), torch.zeros(300, dtype=torch.int64))
    module, callback = Images(), AutobatchCallback(target=256, gpu=CARD, sample=few)
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module)
    assert module.updates == EPOCH


def test_a_loader_whose_size_cannot_follow_is_noticed(tmp_path: Path) -> None:
    class Fixed(Images):
        def train_dataloader(self) -> Any:
            return DataLoader(super().train_dataloader().dataset, batch_size=7)

    with pytest.raises(UsageError, match="batch size 7"):
        trainer(tmp_path, AutobatchCallback(target=256, gpu=CARD)).fit(Fixed())

    class Without(Images):
        def __init__(self) -> None:
            super().__init__()
            del self.batch_size

    with pytest.raises(UsageError, match="has a 'batch_size'"):
        trainer(tmp_path, AutobatchCallback(target=256, gpu=CARD)).fit(Without())


def test_what_is_not_simulated_is_refused_before_anything_runs(tmp_path: Path) -> None:
    class ByHand(Images):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(UsageError, match="manual optimization"):
        trainer(tmp_path, AutobatchCallback(target=256, gpu=CARD)).fit(ByHand())
    by_value = trainer(
        tmp_path,
        AutobatchCallback(target=256, gpu=CARD),
        gradient_clip_val=1.0,
        gradient_clip_algorithm="value",
    )
    with pytest.raises(UsageError, match="clipping by value"):
        by_value.fit(Images())


def test_lightning_still_under_scales_a_partial_window_which_the_callback_mends(
    tmp_path: Path,
) -> None:
    """The reason for `MeanOverWindow`; a failure means that Lightning has mended it."""

    class Line(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            self.gradients: list[float] = []

        def training_step(self, batch: Any) -> Tensor:
            return (self.weight * batch[0]).mean()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            assert self.weight.grad is not None
            self.gradients.append(self.weight.grad.item())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    ones = DataLoader(TensorDataset(torch.ones(5)))
    for callbacks, last in (([], 0.25), ([MeanOverWindow()], 1.0)):
        line = Line()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(tmp_path, *callbacks, max_epochs=1, accumulate_grad_batches=4).fit(line, ones)
        assert line.gradients == [1.0, last]


def test_a_validation_that_runs_while_training_is_said_not_to_have_been_probed(
    tmp_path: Path,
) -> None:
    class Validated(Images):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

        def val_dataloader(self) -> Any:
            return DataLoader(self.train_dataloader().dataset, batch_size=self.batch_size)

    for options, notes in (({}, 1), ({"limit_val_batches": 0}, 0)):
        callback = AutobatchCallback(target=8, gpu=CARD)
        limits = {"max_steps": 1, "num_sanity_val_steps": 0, "limit_train_batches": 1}
        trainer(tmp_path, callback, **limits, **options).fit(Validated())
        assert callback.plan is not None
        assert len([w for w in callback.plan.warnings if "was not probed" in w]) == notes


def test_a_callback_that_sets_sizes_of_its_own_is_refused_before_anything_runs(
    tmp_path: Path,
) -> None:
    callbacks = lightning.callbacks
    for other in (callbacks.GradientAccumulationScheduler({4: 2}), callbacks.BatchSizeFinder()):
        run = trainer(tmp_path, AutobatchCallback(target=256, gpu=LARGER), other)
        with pytest.raises(UsageError, match=f"{type(other).__name__} and AutobatchCallback both"):
            run.fit(Images())


@pytest.mark.slow
def test_accumulation_steps_that_change_while_it_trains_are_noticed(tmp_path: Path) -> None:
    class Doubled(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.accumulate_grad_batches *= 1 + trainer.current_epoch

    module = Images()
    run = trainer(tmp_path, AutobatchCallback(target=256, gpu=LARGER), Doubled())
    with pytest.raises(UsageError, match="accumulate_grad_batches is 2 in epoch 1, and the plan"):
        run.fit(module)
    assert module.updates == EPOCH


@pytest.mark.parametrize("asks", ["trainer", "optimizers", "all_gather"])
def test_a_training_step_that_asks_for_its_trainer_is_told_what_to_do(
    tmp_path: Path, asks: str
) -> None:
    class Asking(Images):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            found = getattr(self, asks)
            found(torch.ones(1)) if asks == "all_gather" else found()
            return super().training_step(batch, batch_idx)

    with pytest.raises(WorkloadError, match=r"is probed on a copy that has none: read self\.curr"):
        trainer(tmp_path, AutobatchCallback(target=256, gpu=LARGER)).fit(Asking())


@pytest.mark.slow
@pytest.mark.parametrize("is_combined", [False, True], ids=["dict", "CombinedLoader"])
def test_several_loaders_are_probed_on_a_batch_that_is_given(
    tmp_path: Path, is_combined: bool
) -> None:
    class Two(Images):
        def train_dataloader(self) -> Any:
            images = torch.zeros(SAMPLES, 1, 8, 8)
            loaders = {name: DataLoader(images, batch_size=self.batch_size) for name in "ab"}
            return lightning.utilities.CombinedLoader(loaders) if is_combined else loaders

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            labels = torch.zeros(len(batch["b"]), dtype=torch.int64, device=batch["b"].device)
            return super().training_step((batch["a"], labels), batch_idx)

    with pytest.raises(UsageError, match=r"several loaders, .* pass one batch"):
        trainer(tmp_path, AutobatchCallback(target=256, gpu=LARGER)).fit(Two())
    sample = {"a": torch.zeros(8, 1, 8, 8), "b": torch.zeros(8, 1, 8, 8)}
    callback, module = AutobatchCallback(target=256, gpu=LARGER, sample=sample), Two()
    trainer(tmp_path, callback, max_epochs=1).fit(module)
    assert module.updates == EPOCH
