"""Experiments: the gradient of one batch at once and in micro-batches, with causes removed or not.

Invariant: every measurement starts from a fresh replica, so that none depends on another.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autobatch.equivalence.module_calls import RecordedRun, run_in_micro_batches
from autobatch.equivalence.numerics import Numerics
from autobatch.equivalence.subject import Replica, Subject
from autobatch.errors import WorkloadError
from autobatch.support.interrupts import let_through
from autobatch.workload.sample import Rows
from autobatch.workload.workload import AUTOCAST_DTYPES

__all__ = ["Ablation", "Experiment", "Gradients", "Weigh", "combined", "differences"]

Gradients = Mapping[str, Tensor]
Weigh = Callable[[Any], float]

_SMALL = 1e-3
"""Gradients below this share of the model's largest one are compared with that share instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """Which possible causes are removed from a run, to see whether a difference goes with them.

    Attributes:
        draws: every random draw is replaced by its mean.
        state: every micro-batch starts from the same state of the model.
        layers: modules that see one micro-batch at a time in the whole batch as well.
    """

    draws: bool = False
    state: bool = False
    layers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A batch, and the sizes of the micro-batches that it is cut into.

    Attributes:
        recorded: the modules' calls on the whole batch; needed where layers are removed.
    """

    subject: Subject
    rows: Rows
    window: tuple[int, ...]
    recorded: RecordedRun | None = None

    def pieces(self) -> list[Any]:
        """Return the micro-batches."""
        starts = [sum(self.window[:step]) for step in range(len(self.window))]
        return [self.rows.cut(a, a + size) for a, size in zip(starts, self.window, strict=True)]

    def whole(self, ablation: Ablation, seed: int = 1) -> Gradients:
        """Return the gradient of all samples at once, with random numbers from a seed.

        Raises:
            WorkloadError: its largest entry is zero, or one is not finite.
        """
        replica = self.subject.replica()
        if ablation.layers:
            assert self.recorded is not None
            for name in ablation.layers:
                run_in_micro_batches(replica.model, name, self.recorded, self.window)
        gradients = self._gradients(replica, self.rows.cut(0, self.rows.size), ablation, seed)
        _check(gradients)
        return gradients

    def parts(self, ablation: Ablation) -> list[Gradients]:
        """Return the gradient of each micro-batch, run one after the other as in a window."""
        replica = self.subject.replica()
        gradients = []
        for step, piece in enumerate(self.pieces()):
            if ablation.state and step:
                replica = self.subject.replica()
            gradients.append(self._gradients(replica, piece, ablation, 2 + step))
        return gradients

    def _gradients(self, replica: Replica, batch: Any, ablation: Ablation, seed: int) -> Gradients:
        replica.model.zero_grad()
        with replica.stage, self.running(hold=ablation.draws, seed=seed):
            let_through()
            replica.value(batch).backward()
            let_through()
        return {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in replica.model.named_parameters()
            if parameter.requires_grad
        }

    @contextlib.contextmanager
    def running(self, *, hold: bool, seed: int = 0) -> Iterator[Numerics]:
        """Set the seed and the numerics in which the user's code runs inside the context."""
        seed = 0 if hold else seed
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(seed)
        autocast = AUTOCAST_DTYPES.get(self.subject.workload.autocast or "")
        exact = self.subject.dtype == torch.float64
        with (
            Numerics(exact=exact, hold=hold) as numerics,
            torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext(),
        ):
            yield numerics


def _check(gradients: Gradients) -> None:
    largest = max(map(_largest, gradients.values()), default=0.0)
    if not 0 < largest < float("inf"):
        raise WorkloadError(
            f"the largest gradient of the whole batch is {largest}: there is nothing to compare; "
            "pass a sample and a loss as in training"
        )


def combined(parts: Sequence[Gradients], weights: Sequence[float]) -> Gradients:
    """Return the weighted sum of gradients."""
    return {
        name: sum(
            (part[name] * weight for part, weight in zip(parts, weights, strict=True)),
            start=torch.zeros_like(parts[0][name]),
        )
        for name in parts[0]
    }


def differences(whole: Gradients, window: Gradients) -> dict[str, float]:
    """Return the relative difference of each parameter's gradient, as `Comparison` defines it."""
    largest = {name: _largest(gradient) for name, gradient in whole.items()}
    floor = _SMALL * max(largest.values())
    return {
        name: _largest(window[name] - gradient) / max(largest[name], floor)
        for name, gradient in whole.items()
    }


def _largest(gradient: Tensor) -> float:
    return float(gradient.abs().max()) if gradient.numel() else 0.0
