"""The gradient of each of Lightning's windows, as that of the mean over its samples.

Lightning divides the loss of every micro-batch by the accumulation steps. Where an epoch ends
earlier the sum is too small, and a small micro-batch counts as much as a whole one. Here the
gradient of a micro-batch is weighted by its samples on the way back, and what has accumulated is
multiplied once before the update, by what makes the weights of all ranks add up to one.

Invariant: a window of whole micro-batches is left as it is, to the last bit; gradients are changed
after the scaler of fp16 and before they are clipped, as Lightning calls `on_before_optimizer_step`
between the two.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from autobatch.errors import SampleError, UsageError
from autobatch.workload.sample import rows_of

__all__ = ["MeanOverWindow", "has_whole_gradients"]


def has_whole_gradients(strategy: Strategy) -> bool:
    """Whether each rank has all gradients, averaged over the ranks, and Lightning accumulates."""
    known = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
    return known and not strategy.handles_gradient_accumulation  # as DeepSpeed does, a kind of DDP


class MeanOverWindow(Callback):  # type: ignore[misc]
    """Gives every update the gradient of the mean over the samples of its window.

    This holds for the partial window in which an epoch ends (`IterableDataset`,
    `limit_train_batches`, `overfit_batches`), for small micro-batches, for those that
    `training_step` skips by returning None, and over ranks with different numbers of samples.
    Batches whose samples cannot be counted count as whole ones. `AutobatchCallback` is one of
    these; by itself it goes with `Trainer(**plan.to_lightning().trainer)`.
    """

    def __init__(self) -> None:
        self._usual: int | None = None  # samples of the first micro-batch; 0 where not countable
        self._weight = 1.0  # of the micro-batch that runs
        self._weights = 0.0  # of those whose gradients have accumulated

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count.

        Raises:
            UsageError: the module optimizes by hand, or parameters are sharded.
        """
        if not pl_module.automatic_optimization:
            raise UsageError(
                f"{type(self).__name__} cannot tell where the windows of manual optimization end: "
                "divide each loss by the micro-batches that its update gets, without the callback"
            )
        if not has_whole_gradients(trainer.strategy):
            raise UsageError(
                f"{type(self).__name__} does not know the gradients of "
                f"{type(trainer.strategy).__name__}: use DDP or one device, or leave it out and "
                "pass samples= to plan.to_lightning"
            )
        self._usual = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the samples of a micro-batch."""
        samples = _samples_of(batch)
        if self._usual is None:
            self._usual = int(trainer.strategy.broadcast(samples))  # one unit for all ranks
        self._weight = samples / self._usual if samples and self._usual else 1.0

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Begin a window; Lightning calls this between its first forward and backward pass."""
        self._weights = 0.0

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Weight the gradient of a micro-batch; the loss itself, which is logged, stays."""
        weight = self._weight
        self._weights += weight
        if weight != 1 and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * weight)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Make the weights of the window add up to one."""
        expected: float = trainer.accumulate_grad_batches * trainer.world_size
        factor: float | Tensor
        if trainer.world_size > 1:
            own = torch.tensor(self._weights, dtype=torch.float64, device=pl_module.device)
            factor = expected / trainer.strategy.reduce(own, reduce_op="sum")
        elif self._weights in (0, expected):
            return
        else:
            factor = expected / self._weights
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)


def _samples_of(batch: Any) -> int:
    """Return the samples of a batch, 0 where they cannot be counted."""
    try:
        return rows_of(batch).size
    except SampleError:
        return 0
