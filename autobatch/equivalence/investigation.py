"""Compares windows with their batches in one dtype, and finds the culprits where they differ.

One possible cause after the other is removed and the gradients are compared again, until only
rounding is left. What a removal changes is the difference that this cause makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from autobatch.advice.wording import count
from autobatch.equivalence.compared_windows import ComparedWindows
from autobatch.equivalence.culprits import culprit
from autobatch.equivalence.gradients import (
    Ablation,
    Experiment,
    Gradients,
    Weigh,
    combined,
    differences,
)
from autobatch.equivalence.module_calls import LOSS, RecordedRun
from autobatch.equivalence.result import Comparison, Culprit, Equivalence
from autobatch.equivalence.subject import Subject
from autobatch.equivalence.suspects import (
    changed_buffers,
    drawing_modules,
    interaction,
    mixing_modules,
    recorded_run,
    stateful_modules,
    with_ignored_labels,
)
from autobatch.equivalence.weights import SUM, fitted_weights, shares, tried_weights
from autobatch.errors import UsageError
from autobatch.support.torch_private import BatchNorm

__all__ = ["TOLERANCES", "Investigation"]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
_AUTOCAST_TOLERANCE = 5e-2
_INTERACTIONS = {torch.float64: 1e-6, torch.float32: 1e-2}

_SEEDS = (9, 10, 11, 12)
"""Seeds tried in turn: with few draws in a batch, two seeds may draw the same numbers."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """The gradients of an experiment, and the differences between window and batch."""

    whole: Gradients
    parts: Sequence[Gradients]
    differences: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.differences.values())


@dataclass(slots=True, kw_only=True)
class Investigation:
    """One check in one floating-point type.

    Attributes:
        subject: the model and loss under test.
        weight: the weight of a micro-batch; its number of samples if None.
        culprits, notes: what has been found so far.
    """

    subject: Subject
    weight: Weigh | None
    culprits: list[Culprit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def tolerance(self) -> float:
        """The largest difference that rounding explains."""
        if self.subject.workload.autocast is not None:
            return _AUTOCAST_TOLERANCE
        return TOLERANCES[self.subject.dtype]

    def result(self, compared: ComparedWindows) -> Equivalence:
        """Compare the windows with their batches, and find the culprits where they differ.

        Raises:
            UsageError: the weights are negative or all zero.
            WorkloadError: there is no gradient to compare.
        """
        experiments = [
            Experiment(subject=self.subject, rows=rows, window=window)
            for window, rows in compared.windows
        ]
        free = held = [self._measured(each, Ablation()) for each in experiments]
        drawing: list[str] = []
        if max(each.worst for each in free) > self.tolerance:
            drawing = drawing_modules(experiments[0])
            if drawing:
                held = [self._measured(each, Ablation(draws=True)) for each in experiments]
            worst = max(range(len(held)), key=lambda index: held[index].worst)
            self._investigate(experiments[worst], held[worst].worst, drawing)
        equivalent = max(each.worst for each in held) <= self.tolerance
        if equivalent:
            self._try_ignored_labels(experiments[-1])
        return Equivalence(
            equivalent=equivalent,
            model=type(self.subject.workload.model).__name__,
            loss=self._loss_kind(experiments[0]),
            weight="its number of samples" if self.weight is None else "the weight given",
            dtype=self._dtype(),
            tolerance=self.tolerance,
            comparisons=tuple(
                Comparison(
                    window=experiment.window,
                    difference=as_run.worst,
                    held_difference=still.worst,
                )
                for experiment, as_run, still in zip(experiments, free, held, strict=True)
            ),
            parameters=max(free, key=lambda each: each.worst).differences,
            culprits=tuple(self.culprits),
            notes=(*compared.notes, *self.notes),
            seconds=0.0,
        )

    def _dtype(self) -> str:
        autocast = self.subject.workload.autocast
        name = str(self.subject.dtype).removeprefix("torch.")
        return name if autocast is None else f"{name} with {autocast} autocast"

    def _loss_kind(self, experiment: Experiment) -> str:
        replica = self.subject.replica()
        with torch.no_grad(), experiment.running(hold=True):
            replica.loss(replica.model, experiment.pieces()[0])
        return replica.loss_kind

    def _shares(self, experiment: Experiment) -> list[float]:
        if self.weight is None:
            return shares(experiment.window)
        weights = [float(self.weight(piece)) for piece in experiment.pieces()]
        if not (min(weights) >= 0 < sum(weights) < float("inf")):
            raise UsageError(
                f"weight(micro_batch) gives {weights}: use numbers of at least 0, not all of them 0"
            )
        return shares(weights)

    def _measured(self, experiment: Experiment, ablation: Ablation) -> _Measured:
        whole, parts = experiment.whole(ablation), experiment.parts(ablation)
        window = combined(parts, self._shares(experiment))
        return _Measured(whole, parts, differences(whole, window))

    def _investigate(self, experiment: Experiment, held: float, drawing: Sequence[str]) -> None:
        """Find the culprits of a window that differs by `held` with every draw at its mean."""
        ablation = Ablation(draws=True, state=True)
        if held <= self.tolerance:
            self._blame_draws(experiment, ablation, drawing)
            return
        recorded = recorded_run(experiment)
        experiment = replace(experiment, recorded=recorded)
        layers = [name for name in mixing_modules(experiment, recorded) if name != LOSS]
        ablation = replace(ablation, layers=frozenset(layers))
        if drawing:
            self._blame_draws(experiment, ablation, drawing)
        ablated = self._measured(experiment, ablation)
        self._blame_layers(experiment, ablation, layers, ablated.whole)
        self._blame_state(experiment, ablation, ablated.parts, recorded)
        if ablated.worst > self.tolerance:
            self.culprits.append(self._of_the_loss(experiment, ablation, ablated, recorded))

    def _blame_draws(
        self, experiment: Experiment, ablation: Ablation, drawing: Sequence[str]
    ) -> None:
        drawn = replace(ablation, draws=False)
        one = experiment.whole(drawn)
        others = (_apart(one, experiment.whole(drawn, seed)) for seed in _SEEDS)
        apart = next((apart for apart in others if apart > self.tolerance), 0.0)
        if apart > self.tolerance:
            self.culprits.append(culprit("random", drawing, apart))

    def _blame_layers(
        self, experiment: Experiment, ablation: Ablation, layers: Sequence[str], ablated: Gradients
    ) -> None:
        model = self.subject.replica().model
        norms = [name for name in layers if isinstance(model.get_submodule(name), BatchNorm)]
        others = [name for name in layers if name not in norms]
        for names, cause in ((norms, "batchnorm"), (others, "layer")):
            kept = replace(ablation, layers=ablation.layers.difference(names))
            apart = _apart(ablated, experiment.whole(kept)) if names else 0.0
            if apart > self.tolerance:
                self.culprits.append(culprit(cause, names, apart))

    def _blame_state(
        self,
        experiment: Experiment,
        ablation: Ablation,
        ablated: Sequence[Gradients],
        recorded: RecordedRun,
    ) -> None:
        weights = self._shares(experiment)
        carried = experiment.parts(replace(ablation, state=False))
        apart = _apart(combined(ablated, weights), combined(carried, weights))
        buffers = changed_buffers(experiment)
        if apart > self.tolerance:
            names = stateful_modules(experiment, recorded)
            self.culprits.append(culprit("state", names, apart, steps=len(weights)))
        elif buffers:
            self.notes.append(
                f"every forward pass changes {count(len(buffers), 'buffer')} ({buffers[0]}), so "
                "once per micro-batch, not once per update; the gradient does not depend on that"
            )

    def _of_the_loss(
        self, experiment: Experiment, ablation: Ablation, ablated: _Measured, recorded: RecordedRun
    ) -> Culprit:
        """Return the culprit in the loss: a wrong weight, samples that interact, or unexplained."""
        worst = ablated.worst
        for expression, weights in tried_weights(experiment.pieces()):
            if _apart(ablated.whole, combined(ablated.parts, weights)) <= self.tolerance:
                if expression == SUM:
                    return culprit("sum", [LOSS], worst)
                return culprit("weight", [expression], worst, weights=weights)
        share = interaction(experiment, ablation, recorded)
        if share > _INTERACTIONS[self.subject.dtype]:
            return culprit("loss", [LOSS], worst, share=share)
        fitted = fitted_weights(ablated.whole, ablated.parts)
        if _apart(ablated.whole, combined(ablated.parts, fitted)) <= self.tolerance:
            return culprit("unnamed weight", [LOSS], worst, weights=fitted)
        return culprit("unexplained", [], worst)

    def _try_ignored_labels(self, experiment: Experiment) -> None:
        """Note the weight that ignored labels (-100) would need, though the sample has none."""
        for ignoring in with_ignored_labels(experiment):
            try:
                measured = self._measured(ignoring, Ablation(draws=True))
            except Exception:  # most integer tensors are no labels, and -100 is out of their range
                continue
            if measured.worst <= self.tolerance:
                continue
            for expression, weights in tried_weights(ignoring.pieces()):
                if _apart(measured.whole, combined(measured.parts, weights)) <= self.tolerance:
                    self.notes.append(
                        "if your batches hold ignored labels (-100), as with padding, pass "
                        f"weight=lambda batch: {expression}; with half of one sample's ignored, "
                        f"the gradients differ by {measured.worst:.2g} without it"
                    )
                    break


def _apart(one: Gradients, other: Gradients) -> float:
    return max(differences(one, other).values())
