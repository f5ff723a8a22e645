"""Every update of Lightning has the gradient of the mean over its samples.

The truth of each test is the gradient of these samples in one batch, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from autobatch.errors import UsageError

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from autobatch.integrations.lightning import AutobatchCallback, MeanOverWindow  # noqa: E402
from tests.integrations.test_lightning import CARD, trainer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*training_step. returned .None"),
    pytest.mark.filterwarnings("ignore:You requested to overfit"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler"),
]

SIZE, STEPS, SAMPLES = 4, 3, 30  # windows of 12, 12 and 4 + 2 samples


def data(samples: int = SAMPLES) -> TensorDataset:
    made = torch.Generator().manual_seed(0)
    rows = torch.randn(samples, 5, generator=made, dtype=torch.float64)
    return TensorDataset(rows, torch.arange(samples) % 3)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(list(data()))


class Module(lightning.LightningModule):
    """Keeps the gradient of each update, and the samples that it should be of."""

    def __init__(self, loader: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.loader = loader
        self.waiting: list[Any] = []
        self.updates: list[tuple[Any, Tensor]] = []

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.net(rows), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.waiting.append(batch)
        return self.loss(*batch)

    def configure_gradient_clipping(self, optimizer: Any, **options: Any) -> None:
        self.clip_gradients(optimizer, **options)
        grads = [p.grad.flatten() for p in self.net.parameters() if p.grad is not None]
        rows, labels = (torch.cat(part) for part in zip(*self.waiting, strict=True))
        self.updates.append(((rows, labels), torch.cat(grads)))
        self.waiting = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return self.loader


def fit(folder: Path, module: Module, **options: Any) -> list[int]:
    """Train, compare each update with all of its samples at once, and return their numbers."""
    given = {"max_epochs": 1, "accumulate_grad_batches": STEPS} | options
    run = trainer(folder, MeanOverWindow(), **given)
    truths: list[Tensor] = []

    def truth(batch: Any) -> Tensor:
        loss = module.loss(*batch)
        grads = torch.autograd.grad(loss, list(module.net.parameters()))
        whole = torch.cat([grad.flatten() for grad in grads])
        limit = options.get("gradient_clip_val")
        return whole if limit is None else whole * min(1.0, limit / (float(whole.norm()) + 1e-6))

    keep = module.configure_gradient_clipping

    def kept(optimizer: Any, **clipping: Any) -> None:
        keep(optimizer, **clipping)
        truths.append(truth(module.updates[-1][0]))

    module.configure_gradient_clipping = kept
    run.fit(module)
    for (_, gradient), expected in zip(module.updates, truths, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    return [len(labels) for (_, labels), _ in module.updates]


@pytest.mark.parametrize(
    ("loader", "options", "updates"),
    [
        (lambda: DataLoader(data(), batch_size=SIZE), {"max_epochs": 2}, [12, 12, 6] * 2),
        (lambda: DataLoader(data(), batch_size=SIZE, drop_last=True), {}, [12, 12, 4]),
        (lambda: DataLoader(Stream(), batch_size=SIZE), {"max_epochs": 2}, [12, 12, 6] * 2),
        (lambda: DataLoader(data(), SIZE), {"limit_train_batches": 5}, [12, 8]),
        (lambda: DataLoader(data(), SIZE), {"limit_train_batches": 0.5}, [12, 4]),
        (lambda: DataLoader(data(), SIZE), {"limit_train_batches": 1}, [4]),
        (lambda: DataLoader(Stream(), SIZE), {"limit_train_batches": 4}, [12, 4]),
        (lambda: DataLoader(data(), SIZE), {"overfit_batches": 5}, [12, 8]),
        (lambda: DataLoader(data(10), SIZE), {}, [10]),
        (lambda: DataLoader(data(), SIZE), {"accumulate_grad_batches": 1}, [4] * 7 + [2]),
    ],
)
def test_an_epoch_may_end_anywhere_in_a_window(
    tmp_path: Path, loader: Any, options: dict[str, Any], updates: list[int]
) -> None:
    assert fit(tmp_path, Module(loader()), **options) == updates


def test_micro_batches_of_any_sizes_count_by_their_samples(tmp_path: Path) -> None:
    sizes = (1, 4, 2, 5, 5, 5, 3)
    edges = [sum(sizes[:end]) for end in range(len(sizes) + 1)]
    chunks = [list(range(first, end)) for first, end in pairwise(edges)]
    loader = DataLoader(data(), batch_sampler=chunks)
    assert fit(tmp_path, Module(loader)) == [7, 15, 3]


def test_a_gradient_is_clipped_after_it_is_whole(tmp_path: Path) -> None:
    loader = DataLoader(data(), batch_size=SIZE)
    assert fit(tmp_path, Module(loader), gradient_clip_val=1e-3) == [12, 12, 6]


def test_validation_in_the_middle_of_a_window_changes_nothing(tmp_path: Path) -> None:
    class Validated(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(*batch)

        def val_dataloader(self) -> Any:
            return DataLoader(data(), batch_size=7)

    module = Validated(DataLoader(data(), batch_size=SIZE))
    assert fit(tmp_path, module, val_check_interval=2) == [12, 12, 6]


def test_a_micro_batch_that_is_skipped_counts_for_nothing(tmp_path: Path) -> None:
    class Skipping(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in (0, 4) else super().training_step(batch, batch_idx)

    assert fit(tmp_path, Skipping(DataLoader(data(), batch_size=SIZE))) == [8, 8, 6]


def test_the_loss_that_is_logged_is_lightnings(tmp_path: Path) -> None:
    class Told(Module):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    runs = []
    for callbacks in ([], [MeanOverWindow()]):
        losses: list[float] = []
        module = Told(DataLoader(data(), batch_size=SIZE))
        run = trainer(tmp_path, *callbacks, max_epochs=1, accumulate_grad_batches=STEPS)
        run.fit(module)
        runs.append(losses)
    assert runs[0] == runs[1]  # of one epoch: its partial window is the last


def test_whole_windows_are_left_as_they_are_to_the_last_bit(tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [MeanOverWindow()]):
        module = Module(DataLoader(data(24), batch_size=SIZE))
        trainer(tmp_path, *callbacks, max_epochs=2, accumulate_grad_batches=STEPS).fit(module)
        weights.append(module.net[0].weight.detach().clone())
    assert torch.equal(*weights)


def test_batches_that_cannot_be_counted_count_as_whole_ones(tmp_path: Path) -> None:
    class Opaque(Dataset[Any]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Any:
            return {"index": index}

    class Reading(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            rows, labels = data()[batch["index"] * SIZE : (batch["index"] + 1) * SIZE]
            return super().training_step((rows, labels), batch_idx)

    loader = DataLoader(Opaque(), batch_size=None)
    assert fit(tmp_path, Reading(loader)) == [12, 8]


def test_a_count_that_not_all_batches_have_is_no_weight(tmp_path: Path) -> None:
    """The first batches cannot be read as samples, the last, of another shape, can."""

    class Mixed(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(data()[batch_idx * SIZE : (batch_idx + 1) * SIZE], 0)

    unknown = [{"index": index} for index in range(4)]
    loader = DataLoader([*unknown, {"index": torch.zeros(9)}], batch_size=None)
    assert fit(tmp_path, Mixed(loader)) == [12, 8]


def test_gradients_that_the_scaler_of_fp16_handed_over_are_whole(tmp_path: Path) -> None:
    """On a CPU there is no scaler of Lightning's; one is put in, as `16-mixed` has it on a GPU."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    plugin.forward_context = plugin.__class__.__mro__[1].forward_context.__get__(plugin)
    loader = DataLoader(data(), batch_size=SIZE)
    assert fit(tmp_path, Module(loader), plugins=[plugin]) == [12, 12, 6]
    assert scaler.get_scale() == 2.0**10  # it was used, and found no overflow


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    module = Module(DataLoader(data(), batch_size=SIZE))
    module.automatic_optimization = False
    with pytest.raises(UsageError, match="windows of manual optimization"):
        trainer(tmp_path, MeanOverWindow(), max_epochs=1).fit(module)


def test_tuned_training_has_whole_gradients_over_a_stream(tmp_path: Path) -> None:
    class Images(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 8
            self.net = nn.Linear(4_000, 40).double()
            self.waiting: list[Tensor] = []
            self.wrong: list[float] = []

        def loss(self, rows: Tensor) -> Tensor:
            return self.net(rows.repeat(1, 1_000)).square().mean()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.waiting.append(batch)
            return self.loss(batch)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            rows = torch.cat(self.waiting)
            self.waiting = []
            (whole,) = torch.autograd.grad(self.loss(rows), [self.net.weight])
            assert self.net.weight.grad is not None
            self.wrong.append(float((self.net.weight.grad - whole).norm() / whole.norm()))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def train_dataloader(self) -> Any:
            class Rows(IterableDataset[Tensor]):
                def __iter__(self) -> Iterator[Tensor]:
                    return iter(torch.randn(700, 4, dtype=torch.float64))

            return DataLoader(Rows(), batch_size=self.batch_size)

    module, callback = Images(), AutobatchCallback(target=256, gpu=CARD)
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module)
    assert callback.plan is not None and callback.plan.accumulation_steps > 1
    assert len(module.wrong) == 3 and max(module.wrong) < 1e-12
    assert run.limit_train_batches == 1.0
