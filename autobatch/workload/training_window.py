"""The training window: what runs between two optimizer updates, on any device.

Invariant: the window here is the loop that users write, with the same lifetimes: the old batch,
output and loss live until the new ones replace them, gradients accumulate over the micro-batches,
and `zero_grad` sets them to None after the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from autobatch.errors import WorkloadError
from autobatch.memory.trace import Phase
from autobatch.support.patching import patched
from autobatch.workload.loss import checked_loss
from autobatch.workload.step_calls import before_steps
from autobatch.workload.workload import AUTOCAST_DTYPES, Loss, Workload

__all__ = ["Phases", "Training", "run_windows"]


class Phases(Protocol):
    """Told where a run is; a device uses it to attribute memory."""

    def begin(self, phase: Phase, window: int = 0, micro_batch: int = 0) -> None:
        """A phase begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What runs on a device in place of the user's objects.

    Attributes:
        workload: its options; the model, loss and optimizer are the device's own copies.
        model: the module on the device, in training mode.
        optimizer: over that module's parameters.
        loss: gives a scalar tensor for a micro-batch.
        batch: makes a micro-batch on the device.
        accumulation_steps: micro-batches between optimizer updates.
        windows: how many updates.
        phases: told where the run is.
    """

    workload: Workload
    model: nn.Module
    optimizer: torch.optim.Optimizer
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
    workload, optimizer, phases = training.workload, training.optimizer, training.phases
    steps = training.accumulation_steps
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # from its usual 2**16 on, a scaler skips the first steps of many runs, and with them the
    # optimizer's state
    scaler = torch.amp.GradScaler("cuda", init_scale=1.0, enabled=workload.autocast == "fp16")
    for window in range(training.windows):
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
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, workload.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return inputs


def _own_windows(training: Training) -> Any:
    """Run the user's window function, and return the last micro-batch.

    The phases are told apart by what the function calls: it takes a micro-batch, it calls
    `backward`, it calls the optimizer's `step`.
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

    def step(*_: Any) -> None:
        phases.begin("step", *divmod(taken - 1, steps))

    original = torch.autograd.backward
    hook = before_steps(training.optimizer, step)
    with hook, patched(torch.autograd, backward=backward):
        for window in range(training.windows):
            run_window(training.model, training.optimizer, batches(window))
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
