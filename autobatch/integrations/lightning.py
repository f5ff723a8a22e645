"""A callback that tunes Lightning's Trainer before it trains."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.parsing import lightning_hasattr, lightning_setattr
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from autobatch.errors import UsageError, WorkloadError
from autobatch.exports.lightning import PRECISIONS, TRAINER
from autobatch.integrations.lightning_window import MeanOverWindow, has_whole_gradients
from autobatch.integrations.nearest import tuned_to_one_size
from autobatch.plan.plan import Plan
from autobatch.records.progress import ProgressCallback, silent
from autobatch.support.randomness import random_state_kept
from autobatch.tuning.tuner import Gpu, tune

__all__ = ["AutobatchCallback", "MeanOverWindow"]

_AUTOCASTS = {precision: autocast for autocast, precision in PRECISIONS.items()}


class AutobatchCallback(MeanOverWindow):
    """Tunes a Trainer in `setup`, before it makes its dataloader, optimizer and schedule.

    What is probed is `training_step` with the optimizer of `configure_optimizers`, on the largest
    samples of the training set, in the Trainer's precision and with its clipping. Then
    `accumulate_grad_batches` and the module's or datamodule's batch size are set. In a distributed
    run all ranks take the plan of the GPU that holds least. Where anything is raised, nothing has
    been set. While it trains, every update gets the gradient of the mean over its samples, that of
    a partial window at the end of an epoch too (`MeanOverWindow`).

    The plan is kept in checkpoints, and a run that resumes from one takes its sizes.

    Args:
        target: effective batch: samples per optimizer update over all GPUs.
        nearest: where the target needs micro-batches of several sizes, take the nearest effective
            batch that does not, and say so in the plan's warnings.
        sample: one batch, a Dataset or a DataLoader, in place of `train_dataloader()`.
        optimizer: as in `autobatch.tune`, in place of that of `configure_optimizers`.
        gpu: as in `autobatch.tune`: None measures the current CUDA device.
        headroom: as in `autobatch.tune`.
        batch_size: name of the attribute that `train_dataloader` takes its batch size from.
        cache: as in `autobatch.tune`.
        progress: told of each step.

    Attributes:
        plan: what was found; None before `fit`.
    """

    def __init__(
        self,
        *,
        target: int,
        nearest: bool = False,
        sample: Any = None,
        optimizer: Any = None,
        gpu: Gpu = None,
        headroom: float | None = None,
        batch_size: str = "batch_size",
        cache: str | os.PathLike[str] | Literal[False] | None = None,
        progress: ProgressCallback = silent,
    ) -> None:
        super().__init__()
        self.plan: Plan | None = None
        self._target = target
        self._nearest = nearest
        self._sample = sample
        self._optimizer = optimizer
        self._batch_size = batch_size
        self._options: dict[str, Any] = {
            "gpu": gpu,
            "headroom": headroom,
            "cache": cache,
            "progress": progress,
        }

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the plan, once, and set what it says.

        Raises:
            UsageError: the trainer does what is not simulated, there is no batch size to set, or
                the target needs micro-batches of several sizes.
            AutobatchError: as from `autobatch.tune`.
        """
        if stage != "fit" or (self.plan is None and trainer.ckpt_path):
            return  # a checkpoint that is known by now brings the plan
        _refuse_the_unknown(trainer, pl_module)
        _refuse_other_sizes(trainer)
        if not lightning_hasattr(pl_module, self._batch_size):
            raise UsageError(
                f"neither the module nor the datamodule has a {self._batch_size!r} that its "
                "train_dataloader could follow: give it one (a loader passed to fit() cannot "
                "change its batch size)"
            )
        plan = self.plan or self._tuned(trainer, pl_module)
        self._set_sizes(trainer, pl_module, plan)
        self.plan = plan

    def _tuned(self, trainer: Trainer, module: LightningModule) -> Plan:
        with random_state_kept():
            sample, optimizer = self._sample, self._optimizer
            make = partial(
                tune,
                module,
                sample=_loader(trainer, module) if sample is None else sample,
                loss=_training_step,
                optimizer=_optimizer_of(trainer, module) if optimizer is None else optimizer,
                autocast=_AUTOCASTS[trainer.precision],
                clip_norm=trainer.gradient_clip_val or None,
                **self._options,
            )
            plan = tuned_to_one_size(
                lambda target: make(target=target), self._target, TRAINER, nearest=self._nearest
            )
        if not trainer.enable_validation:
            return plan
        note = (
            f"the validation that runs while {type(module).__name__} trains was not probed: it may "
            "need more memory than training; give its dataloader no larger batches than the "
            "training's"
        )
        return replace(plan, warnings=(*plan.warnings, note))

    def _set_sizes(self, trainer: Trainer, module: LightningModule, plan: Plan) -> None:
        trainer.accumulate_grad_batches = plan.accumulation_steps
        lightning_setattr(module, self._batch_size, plan.micro_batch)

    def state_dict(self) -> dict[str, Any]:
        """Return what goes into a checkpoint."""
        return {"plan": None if self.plan is None else self.plan.to_json(), "target": self._target}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the sizes of the checkpoint that a run resumes from.

        Raises:
            UsageError: it holds no plan, or one for another target or number of ranks.
        """
        if trainer.state.fn != "fit":
            return
        state = checkpoint["callbacks"].get(self.state_key) or {}
        if not state.get("plan"):
            raise UsageError(
                "the checkpoint holds no plan: the run that wrote it was not tuned; resume it "
                "without AutobatchCallback, with the sizes that it had"
            )
        plan = Plan.from_json(state["plan"])
        if state["target"] != self._target or plan.world_size != trainer.world_size:
            raise UsageError(
                f"the checkpoint was trained for a target of {state['target']} on "
                f"{plan.world_size} ranks, and this run asks for {self._target} on "
                f"{trainer.world_size}: resume with what it had, or load its weights only"
            )
        self._set_sizes(trainer, pl_module, plan)
        self.plan = plan

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Compare the accumulation steps to the plan, as something else may have set them since.

        Raises:
            UsageError: they differ.
        """
        assert self.plan is not None
        steps = self.plan.accumulation_steps
        if trainer.accumulate_grad_batches != steps:
            raise UsageError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches} in epoch "
                f"{trainer.current_epoch}, and the plan says {steps}: let nothing else set it "
                "beside AutobatchCallback"
            )
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the sizes that training begins with to the plan.

        Raises:
            UsageError: they differ.
        """
        super().on_train_start(trainer, pl_module)
        assert self.plan is not None
        real = getattr(trainer.train_dataloader, "batch_size", None)
        if real not in (None, self.plan.micro_batch):
            raise UsageError(
                f"training begins with a dataloader of batch size {real}, the plan says "
                f"{self.plan.micro_batch}: let train_dataloader use self.{self._batch_size}, and "
                "pass no loader to fit()"
            )


def _refuse_the_unknown(trainer: Trainer, module: LightningModule) -> None:
    reasons = {
        f"the strategy {type(trainer.strategy).__name__}": not has_whole_gradients(
            trainer.strategy
        ),
        f"precision={trainer.precision!r}": trainer.precision not in _AUTOCASTS,
        "manual optimization": not module.automatic_optimization,
        "clipping by value": trainer.gradient_clip_algorithm not in (None, "norm"),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UsageError(
            f"AutobatchCallback cannot plan for {' and '.join(found)}: call autobatch.tune before "
            "fit (with sharding= where parameters are sharded), and set what plan.to_lightning() "
            "says"
        )


def _refuse_other_sizes(trainer: Trainer) -> None:
    """Refuse callbacks that set the accumulation steps or the batch size, too.

    Raises:
        UsageError: there are some.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, (GradientAccumulationScheduler, BatchSizeFinder)):
            raise UsageError(
                f"{type(callback).__name__} and AutobatchCallback both set the sizes that the "
                "Trainer trains with: take one of them out; for another effective batch in later "
                "epochs, train up to there and fit again with another target"
            )


def _loader(trainer: Trainer, module: LightningModule) -> Any:
    """Return a training dataloader, at a batch size that does not matter."""
    owner = trainer.datamodule
    if owner is None or not is_overridden("train_dataloader", owner):
        owner = module
    if owner is module and not is_overridden("train_dataloader", owner):
        raise UsageError(
            "neither the module nor the datamodule has a train_dataloader: give it one that uses "
            "its batch size (a loader passed to fit() cannot change its own)"
        )
    try:
        loader = owner.train_dataloader()
    except Exception as error:
        raise WorkloadError(
            f"train_dataloader() failed before the module's setup ({type(error).__name__}: "
            f"{error}): prepare the data in the datamodule's setup, or pass one batch as sample="
        ) from error
    parts = loader.values() if isinstance(loader, Mapping) else loader
    is_several = isinstance(loader, CombinedLoader) or (
        isinstance(loader, (Mapping, list, tuple))
        and any(isinstance(part, (DataLoader, CombinedLoader)) for part in parts)
    )
    if is_several:
        raise UsageError(
            "train_dataloader() gives several loaders, of which the largest samples are not read: "
            "pass one batch as training_step gets it, of the largest samples, as sample="
        )
    return loader


def _training_step(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of one micro-batch, on a copy of the module that has no trainer."""
    module: Any = model
    device = next(module.parameters()).device
    for part in module.modules():
        if hasattr(part, "_device"):  # what self.device says
            part._device = device
    takes_index = len(inspect.signature(module.training_step).parameters) > 1
    with warnings.catch_warnings():
        # without a Trainer nothing is logged, and Lightning says so at every call
        warnings.filterwarnings("ignore", message=r".*self\.log")
        try:
            result = module.training_step(batch, 0) if takes_index else module.training_step(batch)
        except RuntimeError as error:
            if "is not attached to a `Trainer`" not in str(error):
                raise
            raise WorkloadError(
                f"training_step of {type(module).__name__} asks for its Trainer (self.trainer, "
                "self.optimizers() or self.all_gather, say), and is probed on a copy that has "
                "none: read self.current_epoch and self.global_step, which are there, and move "
                "the rest to a hook such as on_before_optimizer_step or on_train_batch_start"
            ) from error
    loss: Tensor = result["loss"] if isinstance(result, Mapping) else result
    return loss


class _BeforeData:
    """Stands in for the trainer while `configure_optimizers` is asked for its optimizer.

    The real one would load the data, and keep it, to say how many steps there will be; only the
    schedule depends on that, and it is thrown away.
    """

    estimated_stepping_batches = 1_000

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def _optimizer_of(trainer: Trainer, module: LightningModule) -> Optimizer:
    """Return an optimizer over the module's parameters, as the run will make one."""
    asked = copy.copy(module)  # shares the parameters
    asked._trainer = _BeforeData(trainer)
    made = asked.configure_optimizers()
    while isinstance(made, (list, tuple, Mapping)):  # (optimizers, schedulers), and the like
        made = made["optimizer"] if isinstance(made, Mapping) else made[0]
    if not isinstance(made, Optimizer):
        raise UsageError(
            f"configure_optimizers returns {type(made).__name__}: pass optimizer= to "
            "AutobatchCallback, such as torch.optim.AdamW"
        )
    return made
