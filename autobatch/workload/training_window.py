"""The training window: what runs between two optimizer updates, on any device.

Invariant: the window here is the loop that users write, with the same lifetimes: the old batch,
output and loss live until the new ones replace them, gradients accumulate over the micro-batches,
and `zero_grad` sets them to None after the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from autobatch.errors import WorkloadError
from autobatch.memory.trace import Phase
from autobatch.support.patching import patched
from autobatch.workload.loss import checked_loss
from autobatch.workload.optimizers import needs_closure, parameters_of
from autobatch.workload.workload import AUTOCAST_DTYPES, Loss, Workload

__all__ = ["Phases", "Training", "run_windows"]


class Phases(Protocol):
    """Told where a run is; a device uses it to attribute memory."""

    def begin(self, phase: Phase, window: int = 0, micro_batch: int = 0) -> None:
        """A phase begins."""

    def ended(self) -> None:
        """A window has run through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What runs on a device in place of the user's objects.

    Attributes:
        workload: its options; the model, loss and optimizer are the device's own copies.
        model: the module on the device, in training mode.
        optimizers: over that module's parameters; all of them step after a window.
        given: the same as a window function gets them: one, or a list or dict of several.
        loss: gives a scalar tensor for a micro-batch.
        batch: makes a micro-batch on the device.
        accumulation_steps: micro-batches between optimizer updates.
        windows: how many updates.
        phases: told where the run is.
    """

    workload: Workload
    model: nn.Module
    optimizers: Sequence[Any]
    given: Any
    loss: Loss
    batch: Callable[[], Any]
    accumulation_steps: int
    windows: int
    phases: Phases

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the loss is computed."""
        dtype = AUTOCAST_DTYPES.get(self.workload.autocast or "")
        return contextlib.nullcontext() if dtype is None else torch.autocast("cuda", dtype=dtype)


def run_windows(training: Training) -> None:
    """Run consecutive training windows, then the evaluation step if there is one.

    Raises:
        WorkloadError: the loss is no scalar tensor, or has no gradient; a window function left
            micro-batches out.
    """
    workload, model = training.workload, training.model
    run = _usual_windows if workload.window is None else _own_windows
    inputs = run(training)
    if workload.evaluate is not None:
        training.phases.begin("evaluate", training.windows - 1, training.accumulation_steps - 1)
        with _evaluating(model), torch.no_grad(), training.autocast():
            workload.evaluate(model, inputs)


def _usual_windows(training: Training) -> Any:
    """Run the loop that users write, and return the last micro-batch."""
    workload, optimizers, phases = training.workload, training.optimizers, training.phases
    steps = training.accumulation_steps
    parameters = list(parameters_of(optimizers))
    # from its usual 2**16 on, a scaler skips the first steps of many runs, and with them the
    # optimizer's state
    scaler = torch.amp.GradScaler("cuda", init_scale=1.0, enabled=workload.autocast == "fp16")
    evaluates = {id(one) for one in optimizers if needs_closure(one)}
    with_closures = set(evaluates)
    for window in range(training.windows):
        if len(evaluates) < len(optimizers):
            for step in range(steps):
                phases.begin("inputs", window, step)
                inputs = training.batch()
                phases.begin("forward", window, step)
                with training.autocast():
                    value = checked_loss(training.loss(training.model, inputs))
                value = scaler.scale(value / steps)
                phases.begin("backward", window, step)
                value.backward()
        phases.begin("step", window, steps - 1)
        if workload.clip_norm is not None:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, workload.clip_norm)
        for optimizer in optimizers:
            again = _Evaluation(training, window, optimizer)
            if id(optimizer) not in with_closures:
                try:
                    scaler.step(optimizer)
                except Exception as error:
                    if not _asks_for_a_closure(error):
                        raise
                    with_closures.add(id(optimizer))
            if id(optimizer) in with_closures:
                scaler.step(optimizer, closure=again)
                inputs = again.inputs
        scaler.update()
        for optimizer in optimizers:
            _without_gradients(optimizer)
        phases.ended()
    return inputs


def _asks_for_a_closure(error: Exception) -> bool:
    """Whether an optimizer that may be stepped without a closure refuses to be."""
    return "closure" in f"{type(error).__name__} {error}".lower()


def _without_gradients(optimizer: Any) -> None:
    """Drop the gradients; wrappers need not have the argument that says how."""
    try:
        optimizer.zero_grad(set_to_none=True)
    except TypeError:
        optimizer.zero_grad()


class _Evaluation:
    """The loss of a window, computed again from inside of a step, with its gradients.

    Attributes:
        inputs: the last micro-batch.
    """

    def __init__(self, training: Training, window: int, optimizer: Any):
        """Evaluate a window of a training for one of its optimizers."""
        self._training, self._window, self._optimizer = training, window, optimizer
        self.inputs: Any = None

    def __call__(self) -> torch.Tensor:
        """Return the loss; all gradients are those of this evaluation."""
        training, window, steps = self._training, self._window, self._training.accumulation_steps
        _without_gradients(self._optimizer)
        total: Any = 0.0
        with torch.enable_grad():
            for step in range(steps):
                training.phases.begin("inputs", window, step)
                self.inputs = training.batch()
                training.phases.begin("forward", window, step)
                with training.autocast():
                    value = checked_loss(training.loss(training.model, self.inputs)) / steps
                training.phases.begin("backward", window, step)
                value.backward()
                total = total + value.detach()
        training.phases.begin("step", window, steps - 1)
        return total  # type: ignore[no-any-return]


def _own_windows(training: Training) -> Any:
    """Run the user's window function, and return the last micro-batch.

    The phases are told apart by what the function calls: it takes a micro-batch, it calls
    `backward`; whoever watches the optimizers begins the phase of a step.
    """
    run_window, phases = training.workload.window, training.phases
    assert run_window is not None
    steps = training.accumulation_steps
    drawn: list[Any] = [None]
    taken = 0

    def batches(window: int) -> Iterator[Any]:
        nonlocal taken
        for step in range(steps):
            phases.begin("inputs", window, step)
            drawn[0] = training.batch()
            phases.begin("forward", window, step)
            taken += 1
            yield drawn[0]

    def backward(*args: Any, **kwargs: Any) -> None:
        phases.begin("backward", *divmod(taken - 1, steps))
        original(*args, **kwargs)

    original = torch.autograd.backward
    with patched(torch.autograd, backward=backward):
        for window in range(training.windows):
            run_window(training.model, training.given, batches(window))
            phases.ended()
            if taken != (window + 1) * steps:
                raise WorkloadError(
                    f"the window function took {taken - window * steps} of "
                    f"{steps} micro-batches: it has to run over all it is given"
                )
    return drawn[0]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()
