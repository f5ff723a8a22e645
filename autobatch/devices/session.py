"""One training process on a device: copies of the user's objects, windows run over them.

Invariant: the user's own model, loss and optimizer are read, never run.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autobatch.devices.copies import Copier
from autobatch.devices.ddp_buckets import GradientBuckets, gradient_buckets
from autobatch.devices.running_module import RunningModule
from autobatch.devices.steps import Steps
from autobatch.devices.warnings import of_data_parallel, without_gradients
from autobatch.errors import AutobatchError, HostMemoryError, WorkloadError
from autobatch.memory.trace import Category, Phase
from autobatch.support.interrupts import let_through
from autobatch.support.tensor_parts import parts_of
from autobatch.support.torch_private import DisableTorchFunction
from autobatch.support.wording import said_by
from autobatch.workload.counts import ModelCounts, counts_of
from autobatch.workload.histories import with_full_history
from autobatch.workload.loss import DefaultLoss
from autobatch.workload.optimizers import (
    each_of,
    is_optimizer,
    made_for,
    mapped,
    names_of,
    parameters_of,
    state_of,
)
from autobatch.workload.training_window import Training, run_windows
from autobatch.workload.tree import map_tensors
from autobatch.workload.workload import Loss, Workload

__all__ = ["MemoryRecorder", "Session", "user_errors"]


class MemoryRecorder(Protocol):
    """Records memory; is told which phase runs, and what tensors are for.

    Attributes:
        running: tells which module of the model is at work.
    """

    running: RunningModule

    def begin(self, phase: Phase, window: int = 0, micro_batch: int = 0) -> None:
        """Mark the beginning of a phase."""

    def tag(self, owned: Iterable[tuple[Any, str | None]], category: Category) -> None:
        """Put the storages of tensors into a category for their whole life.

        Each comes with the module that owns it; None leaves it to the one that made it.
        """

    def claim(self, category: Category | None) -> None:
        """Remember of what is allocated from now on that it would be of a category, if kept."""

    def keep(self) -> None:
        """Put what was claimed, and is alive, into the category that it was claimed for."""

    def live_bytes(self) -> int:
        """Return the bytes that are allocated now."""


class Session:
    """Runs windows over copies, and tells a recorder what their memory is for.

    Attributes:
        optimizers: those that step after a window, or that a window function gets.
        buckets: in which DistributedDataParallel averages gradients.
        counts: of the model's copy, where changes were applied to it; else None.
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
            UsageError: the model is on several cards.
            WorkloadError: something cannot be copied, or there is nothing to train.
        """
        self._device = device
        self._recorder = recorder
        recorder.begin("setup")
        running = self._running = recorder.running
        self.counts: ModelCounts | None = None

        def tagged(copied: nn.Module) -> nn.Module:
            for path, original in model.named_modules():  # before levers change it
                running.call(copier.known(original), path)
            running.learn(copied)
            for change in workload.changes:
                copied = change(copied) or copied
            if workload.changes:
                running.learn(copied)
                self.counts = counts_of(copied, running.name_of)
            wrapped = wrap(copied.to(device) if workload.changes else copied)
            running.learn(wrapped)
            recorder.tag(self._owned_parts(wrapped.parameters()), "parameters")
            recorder.tag(self._owned_parts(wrapped.buffers()), "buffers")
            return wrapped

        # a model is changed before it is on the card, where a change would leave holes
        with copier.on_host() if workload.changes else contextlib.nullcontext():
            copied = copier.model(model).train()
        self._model = copier.changed(copied, tagged)
        if workload.model is not model:  # code may know the model by its wrapper
            copier.remember(workload.model, self._model)
        evaluate, window = copier.any(workload.evaluate), copier.any(workload.window)
        given = workload.loss
        self._loss: Loss = DefaultLoss(like=model) if given is None else copier.any(given)
        made = copier.optimizers_of(workload.optimizer)
        copier.stage()  # what a step and the batches both use counts as the step's
        batch = copier.loader(workload.batch)
        self._workload = replace(workload, evaluate=evaluate, window=window, batch=batch)
        self._copier = copier
        self._stage = copier.stage()
        with self._stage:
            recorder.claim("optimizer_state")
            # no function in this one: its frame in a traceback would hold the session
            self._given = mapped(partial(made_for, model=self._model), made)
            self.optimizers = each_of(self._given)
            for optimizer in self.optimizers:
                with_full_history(optimizer)
            recorder.claim(None)
            recorder.keep()
        _require_training(list(filter(is_optimizer, each_of(made))), self._model)
        buckets = gradient_buckets(workload, self._model)
        self.buckets = buckets.tensors  # held, as DDP holds them
        recorder.tag(((bucket, "") for bucket in self.buckets), "gradients")
        self._shared = {bucket.untyped_storage()._cdata for bucket in self.buckets}
        self._in_buckets = buckets.views.keys()
        for parameter in self._model.parameters():
            if id(parameter) in buckets.views:
                hook = partial(self._averaged, buckets)
                parameter.register_post_accumulate_grad_hook(hook)
        self._steps = Steps(recorder, self._begin_step, self._stepped)
        self._grown: list[int] = []
        self._with_gradients: set[int] = set()
        self._where, self._last = (0, 0), 0
        self._phase: Phase = "setup"
        for optimizer in self._optimizers():
            self._steps.watch(optimizer)
        # a loss may have parameters of its own
        recorder.tag(self._owned_parts(self._trained()), "parameters")
        self._tag_optimizer_state(attributes=True)

    @property
    def optimizer_name(self) -> str:
        """The classes of the optimizers, as a plan names them."""
        return names_of(self.optimizers)

    @property
    def loss_kind(self) -> str:
        """How the loss is obtained, as a plan names it."""
        if self._workload.window is not None:
            return "window function"
        if self._workload.loss is not None:
            return self._workload.loss_name
        return (self._loss.kind if isinstance(self._loss, DefaultLoss) else None) or "user"

    @property
    def loss_code(self) -> str | None:
        """The expression that the loss is; None where it is a function of the user's."""
        return self._loss.code if isinstance(self._loss, DefaultLoss) else None

    @property
    def grown_bytes(self) -> int:
        """By how much what is alive after a window grew from the first to the last."""
        return self._grown[-1] - self._grown[0] if self._grown else 0

    @property
    def notes(self) -> list[str]:
        """What the user should know about windows that ran through."""
        notes = list(dict.fromkeys(self._copier.notes))
        notes += of_data_parallel(self._workload.model)
        notes += self._steps.notes(self.optimizers)
        trained = {id(p) for p in self._trained() if p.requires_grad}
        missed = [
            name.removeprefix("_orig_mod.")
            for name, parameter in self._model.named_parameters()
            # of a flat parameter, a rank may hold none of a layer's part
            if id(parameter) in trained and parameter.numel() and not self._has_learned(parameter)
        ]
        return [*notes, *without_gradients(missed, len(trained))]

    def _has_learned(self, parameter: Tensor) -> bool:
        """Whether a parameter got a gradient; what hooks do with it at once is not seen."""
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or ()
        own = id(parameter) in self._in_buckets
        return id(parameter) in self._with_gradients or len(hooks) > own

    def _averaged(self, buckets: GradientBuckets, parameter: Tensor) -> None:
        """Put a gradient into its bucket in the last micro-batch, in which DDP averages."""
        if self._phase != "backward" or self._where[1] == self._last:
            buckets.move(parameter)

    def _optimizers(self) -> list[Any]:
        """Return the optimizers that run, and those that the user's code steps by itself."""
        return each_of([*self.optimizers, *self._copier.optimizers])

    def _begin_step(self) -> None:
        """Begin the phase of a step that the user's code makes; hooks step in the backward pass."""
        if self._phase != "step":
            self.begin("step", *self._where)

    def train(
        self, micro_batch: int, accumulation_steps: int, *, windows: int, evaluate: bool = True
    ) -> None:
        """Run windows of `accumulation_steps` micro-batches, then the evaluation if asked to."""
        self._last = accumulation_steps - 1
        with self._stage, self._steps.of_others(), self._running.followed():
            self._run(micro_batch, accumulation_steps, windows, evaluate)
        if isinstance(self._loss, DefaultLoss):
            self._loss.forget()
        self._tag()

    def let_go(self) -> None:
        """Let optimizers that hooks step go of what steps them: no more windows will run."""
        for optimizer in self.optimizers:
            if callable(let_go := getattr(optimizer, "let_go", None)):
                let_go()

    def _run(self, micro_batch: int, accumulation_steps: int, windows: int, evaluate: bool) -> None:
        workload = self._workload
        run_windows(
            Training(
                workload=workload if evaluate else replace(workload, evaluate=None),
                model=self._model,
                optimizers=self.optimizers,
                given=self._given,
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
        self._where, self._phase = (window, micro_batch), phase
        if phase in ("inputs", "step"):
            gc.collect(1)  # otherwise cyclic garbage is freed at a random moment
            self._tag()
        self._recorder.begin(phase, window, micro_batch)

    def ended(self) -> None:
        """Note what is alive at the end of a window."""
        gc.collect(1)
        self._grown.append(self._recorder.live_bytes())

    def _tag(self) -> None:
        with DisableTorchFunction():  # a mode would be asked for each attribute of each tensor
            self._tag_all()

    def _tag_all(self) -> None:
        # a sharded parameter is in the optimizer also while the model has the whole one
        self._tag_gradients(itertools.chain(self._model.parameters(), self._trained()))
        self._tag_optimizer_state()

    def _stepped(self, optimizer: Any) -> None:
        with DisableTorchFunction():
            self._tag_gradients(parameters_of([optimizer]))

    def _tag_gradients(self, parameters: Iterable[Tensor]) -> None:
        learned = {id(p): p for p in parameters if p.grad is not None}
        self._with_gradients |= learned.keys()
        gradients = (
            (part, None if part.untyped_storage()._cdata in self._shared else owner)
            for parameter in learned.values()
            for owner in (self._running.owner(parameter),)
            for part in parts_of(parameter.grad)  # type: ignore[arg-type]
        )
        self._recorder.tag(gradients, "gradients")

    def _trained(self) -> Iterator[Tensor]:
        return parameters_of(self._optimizers())

    def _owned_parts(self, tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, str | None]]:
        """Yield the memory of parameters or buffers, with the modules that own them."""
        owner = self._running.owner
        return ((part, owner(tensor)) for tensor in tensors for part in parts_of(tensor))

    def _tag_optimizer_state(self, *, attributes: bool = False) -> None:
        held = set(map(id, self._trained()))
        tensors = (
            (part, owners.get(id(value)))
            for optimizer in self._optimizers()
            for owners in (self._owners_of_state(optimizer),)
            for value in state_of(optimizer, attributes=attributes)
            if id(value) not in held
            for part in parts_of(value)
        )
        self._recorder.tag(tensors, "optimizer_state")

    def _owners_of_state(self, optimizer: Any) -> dict[int, str | None]:
        """Return, of state that an optimizer keeps by parameter, the parameters' modules."""
        state = getattr(optimizer, "state", None)
        return {
            id(value): self._running.owner(parameter)
            for parameter, kept in (list(state.items()) if isinstance(state, Mapping) else ())
            if isinstance(parameter, Tensor) and isinstance(kept, Mapping)
            for value in kept.values()
            if isinstance(value, Tensor)
        }

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.device == self._device else tensor.to(self._device)


def _require_training(optimizers: Sequence[Any], model: nn.Module) -> None:
    """Refuse given optimizers of which none holds a parameter of the model."""
    held = set(map(id, parameters_of(optimizers)))
    if optimizers and not held & set(map(id, model.parameters())):
        raise WorkloadError(
            f"the {names_of(optimizers)} holds none of the model's parameters: make it "
            "from the parameters of the model that is tuned"
        )


@contextlib.contextmanager
def user_errors(workload: Workload, micro_batch: int) -> Iterator[None]:
    """Turn whatever the user's code raises into one clear line, with its traceback chained."""
    try:
        yield
    except AutobatchError:
        raise
    except (Exception, SystemExit) as error:
        what = f"{type(workload.model).__name__} failed at micro-batch {micro_batch:,}"
        kind = HostMemoryError if isinstance(error, MemoryError) else WorkloadError
        raise kind(f"{what}: {said_by(error)}") from error
