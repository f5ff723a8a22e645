"""Gradients of one batch, at once and in micro-batches, with or without what may tell them apart.

Invariant: every measurement starts from fresh copies, so that none depends on another.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.equivalence.arithmetic import Arithmetic
from autobatch.equivalence.layers import Layout, one_micro_batch_at_a_time
from autobatch.equivalence.subject import Copy, Subject
from autobatch.errors import WorkloadError
from autobatch.workload.sample import Rows
from autobatch.workload.workload import AUTOCAST_DTYPES

__all__ = ["Experiment", "Gradients", "Mends", "Weigh", "combined", "differences"]

Gradients = Mapping[str, Tensor]
Weigh = Callable[[Any], float]

_SMALL = 1e-3
"""Share of the model's largest gradient below which a gradient's own size is no measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mends:
    """What is taken away from a run, to see whether a difference goes with it.

    Attributes:
        draws: every random draw is replaced by its mean.
        state: every micro-batch begins from the same state.
        layers: modules that see one micro-batch at a time, in the whole batch too.
    """

    draws: bool = False
    state: bool = False
    layers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A batch and the sizes that it is cut into."""

    subject: Subject
    rows: Rows
    window: tuple[int, ...]
    layout: Layout | None = None

    def pieces(self) -> list[Any]:
        """Return the micro-batches."""
        starts = [sum(self.window[:step]) for step in range(len(self.window))]
        return [self.rows.cut(a, a + size) for a, size in zip(starts, self.window, strict=True)]

    def whole(self, mends: Mends, seed: int = 1) -> Gradients:
        """Return the gradient of all samples at once, with random numbers from a seed.

        Raises:
            WorkloadError: it is zero or not finite everywhere.
        """
        copy = self.subject.copy()
        if mends.layers:
            assert self.layout is not None
            for name in mends.layers:
                one_micro_batch_at_a_time(copy.model, name, self.layout, self.window)
        gradients = self._gradients(copy, self.rows.cut(0, self.rows.size), mends, seed)
        _check(gradients)
        return gradients

    def parts(self, mends: Mends) -> list[Gradients]:
        """Return the gradient of each micro-batch, which follow one another as in a window."""
        copy = self.subject.copy()
        gradients = []
        for step, piece in enumerate(self.pieces()):
            if mends.state and step:
                copy = self.subject.copy()
            gradients.append(self._gradients(copy, piece, mends, 2 + step))
        return gradients

    def _gradients(self, copy: Copy, batch: Any, mends: Mends, seed: int) -> Gradients:
        parameters = dict(copy.model.named_parameters())
        with self.running(hold=mends.draws, seed=seed):
            copy.value(batch).backward()
        return {
            name: torch.zeros_like(parameter) if grad is None else grad
            for name, parameter in parameters.items()
            if parameter.requires_grad
            for grad in [_taken(parameter)]
        }

    @contextlib.contextmanager
    def running(self, *, hold: bool, seed: int = 0) -> Iterator[Arithmetic]:
        """Run the user's code within: in the subject's arithmetic, from a seed."""
        seed = 0 if hold else seed
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(seed)
        autocast = AUTOCAST_DTYPES.get(self.subject.workload.autocast or "")
        exact = self.subject.dtype == torch.float64
        with (
            Arithmetic(exact=exact, hold=hold) as arithmetic,
            torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext(),
        ):
            yield arithmetic


def _taken(parameter: nn.Parameter) -> Tensor | None:
    gradient, parameter.grad = parameter.grad, None
    return gradient


def _check(gradients: Gradients) -> None:
    largest = max((float(g.abs().max()) for g in gradients.values() if g.numel()), default=0.0)
    if not 0 < largest < float("inf"):
        raise WorkloadError(
            f"the largest gradient of the whole batch is {largest}: there is nothing to compare; "
            "pass a sample and a loss as in training"
        )


def combined(parts: Sequence[Gradients], weights: Sequence[float]) -> Gradients:
    """Add up gradients with weights."""
    return {
        name: sum(
            (part[name] * weight for part, weight in zip(parts, weights, strict=True)),
            start=torch.zeros_like(parts[0][name]),
        )
        for name in parts[0]
    }


def differences(whole: Gradients, window: Gradients) -> dict[str, float]:
    """Return the difference of each parameter's gradient, as `Comparison` defines it."""
    largest = {name: _largest(gradient) for name, gradient in whole.items()}
    floor = _SMALL * max(largest.values())
    return {
        name: _largest(window[name] - gradient) / max(largest[name], floor)
        for name, gradient in whole.items()
    }


def _largest(gradient: Tensor) -> float:
    return float(gradient.abs().max()) if gradient.numel() else 0.0
