"""The loss by itself: run on outputs of the model that were recorded, for a batch or a part of it.

A module's call is answered from the record where all of its outputs have one part for each sample,
whatever its inputs are now. The gradients at these outputs show what the loss does, without a pass
through the model. Code that computes a loss inside of a model runs as it is.

Invariant: the outputs are those of the whole batch, so nothing but the loss can make a difference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.equivalence.compared_windows import changed_rows
from autobatch.equivalence.draws import Draws, Span
from autobatch.equivalence.experiment import Experiment, seed_all
from autobatch.equivalence.gradients import Gradients, Measured, divided, is_continuous
from autobatch.equivalence.module_calls import (
    LOSS,
    Axes,
    Axis,
    changed_values,
    spans,
)
from autobatch.equivalence.numerics import Reads
from autobatch.equivalence.subject import Replica
from autobatch.support.torch_private import current_transform_level
from autobatch.workload.loss import checked_loss
from autobatch.workload.sample import Rows
from autobatch.workload.tree import tensors, with_tensors

__all__ = ["AtOutputs", "Replay"]

_SMALL = 1e-6
"""At the outputs rounding is not amplified, so that smaller gradients are compared too."""

_FACTORS = (32.0, 1 / 32)
_MOST = 2**22
"""Entries of outputs above which two moves are all, because each takes seconds."""

_Where = tuple[str, str, int]
"""A call of a module: what calls it, its name, and how often it was called so before."""

_MOVES = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)
"""By so many standard deviations of an output its entries move one after the other: they come
close to where a loss is least, if that is near, and go far if it is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtOutputs:
    """Gradients of the loss of a batch and of its micro-batches.

    Attributes:
        outputs: at the outputs of the model, those of each micro-batch by a name of their own.
        parameters: at parameters that the loss uses without a module.
    """

    outputs: Measured
    parameters: Measured

    def apart(self, weights: Sequence[float]) -> float:
        """Return the largest difference between the batch and the weighted micro-batches."""
        return max(self.outputs.apart(weights), self.parameters.apart(weights))

    def fitted(self) -> list[float]:
        """Return the weights of micro-batches that fit best at the outputs."""
        return self.outputs.fitted()

    def sampled(self) -> AtOutputs:
        """Return the same with some of the entries."""
        return AtOutputs(outputs=self.outputs.sampled(), parameters=self.parameters.sampled())


class Replay:
    """Runs the loss of one experiment on the recorded outputs of its whole batch.

    Attributes:
        experiment: of which the outputs are.
    """

    def __init__(self, experiment: Experiment) -> None:
        """Take the outputs of the experiment's whole batch."""
        self.experiment = experiment
        self._answers = experiment.outputs()
        self._moves: dict[str, Tensor] = {}  # what is added to outputs, of all samples

    def read(self, reads: Reads) -> None:
        """Run the loss once, without a backward pass, to note what it computes with."""
        rows = self.experiment.rows
        self._run(rows, None, Draws(rows.size), reads)

    def gradients(self, varied: Experiment) -> AtOutputs:
        """Return the gradients of the loss of a batch and of its micro-batches.

        The backward pass of a micro-batch begins with its share, as in training, and what it gives
        is divided by that, as in `Experiment.parts`.

        Args:
            varied: an experiment on the recorded batch, perhaps with other labels or masks.
        """
        window, rows, size = self.experiment.window, varied.rows, varied.rows.size
        draws = Draws(size)
        outputs, parameters = self._run(rows, None, draws)
        whole = {
            f"{name} {step}": axis.cut(gradient, start, stop)
            for name, (gradient, axis) in outputs.items()
            for step, (start, stop) in enumerate(spans(window))
        }
        parts, owned = [], []
        for step, (span, seed) in enumerate(zip(spans(window), varied.seeds(), strict=True)):
            found, own = self._run(rows, span, draws, seed=seed)
            part = {f"{name} {step}": gradient for name, (gradient, _) in found.items()}
            parts.append(divided(part, seed))
            owned.append(divided(own, seed))
        return AtOutputs(
            outputs=Measured(whole=whole, parts=parts, small=_SMALL),
            parameters=Measured(whole=parameters, parts=owned),
        )

    def interaction(self, *, of_outputs: bool = False) -> float:
        """Return how much the gradient of some samples depends on the values of the others.

        The values of all samples after the first micro-batch are changed, in the outputs and in the
        batch. A weight that counts does not depend on values, so that whatever changes for the
        first micro-batch is an interaction; the result is relative to its gradient.

        Args:
            of_outputs: whether only outputs with a gradient are changed, and in a second way, too:
                all of the samples get the values of one. That changes which are the largest.
        """
        size, first = self.experiment.rows.size, self.experiment.window[0]
        rows = self.experiment.rows
        draws = Draws(size)
        before, _ = self._run(rows, None, draws)
        others = rows if of_outputs else changed_rows(rows, [(first, size)])

        def change(part: Tensor, axis: Axis, learns: bool) -> None:
            if learns or not of_outputs:
                other = axis.cut(part, first, size)  # a view
                other.copy_(changed_values(other))

        def repeat(part: Tensor, axis: Axis, learns: bool) -> None:
            for index in range(first, size) if learns else ():
                axis.cut(part, index, index + 1).copy_(axis.cut(part, 0, 1))

        changes = (change, repeat) if of_outputs else (change,)
        runs = [self._run(others, (0, size), draws, changed=each)[0] for each in changes]
        return max(_moved(before, after, first) for after in runs)

    def elsewhere(self) -> float:
        """Return the largest difference of batch and micro-batches at outputs as training has them.

        The outputs go against their gradients, along with them, and farther from zero or closer to
        it: those of the last sample farthest and those of the first not at all, so that samples
        have learned more or less.
        """
        moves: list[Callable[[], None]] = [partial(self._move, -by) for by in _MOVES]
        moves += [self._moves.clear, *(partial(self._move, by) for by in _MOVES[:2])]
        for factor in _FACTORS:
            moves += [self._moves.clear, partial(self._scale, factor)]
        answers = (tensor for output, _ in self._answers.values() for tensor in tensors(output))
        if sum(tensor.numel() for tensor in answers) > _MOST:
            moves = moves[:2]
        found = [0.0]
        try:
            for move in moves:
                move()
                if self._moves:
                    apart = self.gradients(self.experiment).apart(self.experiment.shares())
                    found.append(apart if math.isfinite(apart) else 0.0)
        finally:
            self._moves.clear()
        return max(found)

    def _move(self, by: float) -> None:
        """Move outputs along the signs of their gradients by so many standard deviations."""
        for label, output, gradient, axis in self._learning():
            spread = float(output.std(correction=0)) or 1.0
            moved = self._moves.setdefault(label, torch.zeros_like(gradient))
            for sample, share in enumerate(self._shares()):
                along = axis.cut(gradient, sample, sample + 1).sign()
                axis.cut(moved, sample, sample + 1).add_(by * spread * share * along)

    def _scale(self, by: float) -> None:
        """Multiply outputs."""
        for label, output, gradient, axis in self._learning():
            moved = self._moves.setdefault(label, torch.zeros_like(gradient))
            for sample, share in enumerate(self._shares()):
                part = axis.cut(output, sample, sample + 1)
                axis.cut(moved, sample, sample + 1).copy_((by**share - 1) * part)

    def _learning(self) -> Iterator[tuple[str, Tensor, Tensor, Axis]]:
        """Yield the outputs at which the loss has gradients: names, values, gradients and axes."""
        size = self.experiment.rows.size
        gradients, _ = self._run(self.experiment.rows, None, Draws(size))
        for where, (output, _) in self._answers.items():
            for index, tensor in enumerate(tensors(output)):
                label = _label(where, index)
                if label in gradients:
                    yield label, tensor.detach(), *gradients[label]

    def _shares(self) -> list[float]:
        """Return how far each sample goes."""
        size = self.experiment.rows.size
        return [sample / max(size - 1, 1) for sample in range(size)]

    def _run(
        self,
        rows: Rows,
        given: Span | None,
        draws: Draws,
        reads: Reads | None = None,
        changed: Callable[[Tensor, Axis, bool], None] | None = None,
        seed: float = 1.0,
    ) -> tuple[dict[str, tuple[Tensor, Any]], Gradients]:
        """Return gradients at outputs with their axes, and at parameters.

        The backward pass begins with the `seed`. There is none where it is to be found out what
        the loss `reads`. Draws are recorded where no samples are given.
        """
        span = given or (0, rows.size)
        experiment = self.experiment
        replica = experiment.subject.replica()
        answered: dict[str, tuple[Tensor, Any]] = {}
        self._answer(replica, span, answered, changed)
        seed_all(1)
        with replica.stage, experiment.running(draws, given) as numerics:
            numerics.reads = reads
            value = replica.loss(replica.model, rows.cut(*span))
            numerics.reads = None
            if reads is None:
                value = checked_loss(value)
                value.backward(torch.full_like(value, seed))
        experiment.subject.refresh()
        return (
            {n: (t.grad, axis) for n, (t, axis) in answered.items() if t.grad is not None},
            {n: t.grad for n, t in replica.trained.items() if t.grad is not None},
        )

    def _answer(
        self,
        replica: Replica,
        span: Span,
        answered: dict[str, tuple[Tensor, Any]],
        changed: Callable[[Tensor, Axis, bool], None] | None,
    ) -> None:
        """Let the modules of a replica answer from the record where they can."""
        running: list[str] = []
        numbers: Counter[tuple[str, str]] = Counter()

        def rows_of(output: Any, axes: Axes, where: _Where) -> Any:
            found = []
            for index, (tensor, axis) in enumerate(zip(tensors(output), axes, strict=False)):
                learns, tensor = tensor.requires_grad, tensor.detach()
                part = tensor.clone() if axis is None else axis.cut(tensor, *span).clone()
                if axis is not None and changed is not None and is_continuous(part):
                    changed(part, axis, learns)
                if axis is not None and learns and torch.is_grad_enabled():
                    name = _label(where, index)
                    if name in self._moves:
                        part += axis.cut(self._moves[name], *span)
                    answered[name] = (part.requires_grad_(), axis)
                    part = part * 1.0  # what runs next may write into it, but not into a leaf
                found.append(part)
            return with_tensors(output, found)

        def wrapped(name: str, module: nn.Module) -> Any:
            original = module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                if current_transform_level() is not None:
                    return original(*args, **kwargs)  # not in the record
                caller = running[-1] if running else LOSS
                where = (caller, name, numbers[caller, name])
                numbers[caller, name] += 1
                answer = self._answers.get(where)
                if answer is not None:
                    return rows_of(*answer, where)
                running.append(name)
                try:
                    return original(*args, **kwargs)
                finally:
                    running.pop()

            return forward

        known = {name for _, name, _ in self._answers}
        for name, module in replica.model.named_modules():
            if name in known:  # the record is of what the user's hooks have returned
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
            module.forward = wrapped(name, module)


def _label(where: _Where, index: int) -> str:
    """Return what one tensor of an output is called."""
    return f"{', '.join(map(str, where))}.{index}"


def _moved(
    before: Mapping[str, tuple[Tensor, Axis]], after: Mapping[str, tuple[Tensor, Axis]], first: int
) -> float:
    """Return the largest change of the first samples' gradients, relative to these."""
    shares = [0.0]
    for name, (gradient, axis) in before.items():
        one = axis.cut(gradient, 0, first)
        if name in after and float(one.abs().max()):
            other = axis.cut(after[name][0], 0, first)
            shares.append(float((other - one).abs().max() / one.abs().max()))
    return max(shares)
