"""One training process on a device: copies of the user's objects, windows run over them.

Invariant: the user's own model, loss and optimizer are read, never run.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autobatch.devices.copies import Copier
from autobatch.devices.ddp_buckets import gradient_buckets
from autobatch.errors import AutobatchError, WorkloadError
from autobatch.memory.trace import Category, Phase
from autobatch.support.interrupts import let_through
from autobatch.support.wording import said_by
from autobatch.workload.loss import DefaultLoss
from autobatch.workload.step_calls import after_steps
from autobatch.workload.training_window import Training, run_windows
from autobatch.workload.tree import map_tensors
from autobatch.workload.workload import Loss, Workload

__all__ = ["MemoryRecorder", "Session", "user_errors"]


class MemoryRecorder(Protocol):
    """Records memory; is told which phase runs, and what tensors are for."""

    def begin(self, phase: Phase, window: int = 0, micro_batch: int = 0) -> None:
        """Mark the beginning of a phase."""

    def tag(self, tensors: Iterable[Any], category: Category) -> None:
        """Put the storages of tensors into a category for their whole life."""


class Session:
    """Runs windows over copies, and tells a recorder what their memory is for.

    Attributes:
        optimizer: the optimizer that runs.
    """

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        device: torch.device,
        copier: Copier,
        recorder: MemoryRecorder,
        wrap: Callable[[nn.Module], nn.Module],
    ):
        """Copy a workload's objects to a device.

        Args:
            workload: what the user wants to run.
            model: its module to train, without wrappers of compilers and data parallelism.
            device: where it runs.
            copier: makes the copies.
            recorder: records the memory of the device.
            wrap: makes what will run from the copied module, before the optimizer is made.

        Raises:
            WorkloadError: something cannot be copied, or there is nothing to train.
        """
        self._device = device
        self._recorder = recorder
        recorder.begin("setup")

        def tagged(copied: nn.Module) -> nn.Module:
            wrapped = wrap(copied)
            recorder.tag(map(_local, copied.parameters()), "parameters")
            recorder.tag(copied.buffers(), "buffers")
            return wrapped

        self._model = copier.changed(copier.model(model).train(), tagged)
        if workload.model is not model:  # code may know the model by its wrapper
            copier.remember(workload.model, self._model)
        evaluate, window = copier.any(workload.evaluate), copier.any(workload.window)
        self._loss: Loss = DefaultLoss() if workload.loss is None else copier.any(workload.loss)
        made = copier.any(workload.optimizer)
        copier.stage()  # what a step and the batches both use counts as the step's
        batch = copier.loader(workload.batch)
        self._workload = replace(workload, evaluate=evaluate, window=window, batch=batch)
        self._copier = copier
        self._stage = copier.stage()
        with self._stage:
            self.optimizer = _optimizer(made, self._model)
        self._buckets = gradient_buckets(workload, self._model)  # held, as DDP holds them
        recorder.tag(self._buckets, "gradients")
        self._steps = 0
        self._stepped: set[str] = set()
        for optimizer in self._optimizers():
            self._watch(optimizer)
        # a loss may have parameters of its own
        recorder.tag(map(_local, self._trained()), "parameters")
        self._tag_optimizer_state()

    @property
    def loss_kind(self) -> str:
        """How the loss is obtained, as a plan names it."""
        if self._workload.window is not None:
            return "window function"
        if self._workload.loss is not None:
            return self._workload.loss_name
        return (self._loss.kind if isinstance(self._loss, DefaultLoss) else None) or "user"

    @property
    def notes(self) -> list[str]:
        """What the user should know about windows that ran through."""
        notes = list(dict.fromkeys(self._copier.notes))
        if self._steps:
            return notes
        others = f"; {' and '.join(sorted(self._stepped))} did" if self._stepped else ""
        notes.append(
            f"{type(self.optimizer).__name__} never made a step{others} (in fp16, gradients that "
            "are not finite skip it): its state may be missing from the account"
        )
        return notes

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizer that runs, and those that the user's code steps by itself."""
        others = [other for other in self._copier.optimizers if other is not self.optimizer]
        return [self.optimizer, *others]

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Notice the steps of an optimizer."""
        is_ours = optimizer is self.optimizer

        def stepped(*_: Any) -> None:
            if is_ours:
                self._steps += 1
            else:
                self._stepped.add(type(optimizer).__name__)

        after_steps(optimizer, stepped)

    def train(
        self, micro_batch: int, accumulation_steps: int, *, windows: int, evaluate: bool = True
    ) -> None:
        """Run windows of `accumulation_steps` micro-batches, then the evaluation if asked to."""
        with self._stage:
            self._run(micro_batch, accumulation_steps, windows, evaluate)
        if isinstance(self._loss, DefaultLoss):
            self._loss.forget()
        self._tag()

    def _run(self, micro_batch: int, accumulation_steps: int, windows: int, evaluate: bool) -> None:
        workload = self._workload
        run_windows(
            Training(
                workload=workload if evaluate else replace(workload, evaluate=None),
                model=self._model,
                optimizer=self.optimizer,
                loss=self._loss,
                batch=lambda: map_tensors(self._to_device, workload.batch(micro_batch)),
                accumulation_steps=accumulation_steps,
                windows=windows,
                phases=self,
            )
        )

    def begin(self, phase: Phase, window: int = 0, micro_batch: int = 0) -> None:
        """Tag what the phase that ends has made, and mark the beginning of the next."""
        let_through()
        if phase in ("inputs", "step"):
            gc.collect(1)  # otherwise cyclic garbage is freed at a random moment
            self._tag()
        self._recorder.begin(phase, window, micro_batch)

    def _tag(self) -> None:
        # a sharded parameter is in the optimizer also while the model has the whole one
        parameters = itertools.chain(self._model.parameters(), self._trained())
        gradients = (_local(p.grad) for p in parameters if p.grad is not None)
        self._recorder.tag(gradients, "gradients")
        self._tag_optimizer_state()

    def _trained(self) -> Iterator[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _tag_optimizer_state(self) -> None:
        tensors = (
            _local(value)
            for optimizer in self._optimizers()
            for state in optimizer.state.values()
            if isinstance(state, dict)
            for value in state.values()
            if isinstance(value, Tensor)
        )
        self._recorder.tag(tensors, "optimizer_state")

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.device == self._device else tensor.to(self._device)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that is sharded over several (a DTensor)."""
    return getattr(tensor, "_local_tensor", tensor)


def _optimizer(given: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Return a copied optimizer if it is one of the model's, or make one of its parameters."""
    if isinstance(given, torch.optim.Optimizer):
        held = [p for group in given.param_groups for p in group["params"]]
        if not set(map(id, held)) & set(map(id, model.parameters())):
            raise WorkloadError(
                f"the {type(given).__name__} holds none of the model's parameters: make it "
                "from the parameters of the model that is tuned"
            )
        return given
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise WorkloadError("no parameter requires a gradient: there is nothing to train")
    return given(trainable)  # type: ignore[no-any-return]


@contextlib.contextmanager
def user_errors(workload: Workload, micro_batch: int) -> Iterator[None]:
    """Turn whatever the user's code raises into one clear line, with its traceback chained."""
    try:
        yield
    except AutobatchError:
        raise
    except (Exception, SystemExit) as error:
        what = f"{type(workload.model).__name__} failed at micro-batch {micro_batch}"
        raise WorkloadError(f"{what}: {said_by(error)}") from error
