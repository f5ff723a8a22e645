"""Compare the gradients of windows, and find out why they differ.

One suspect after the other is taken away and the gradient measured again, until what remains is
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from autobatch.advice.wording import count
from autobatch.equivalence import culprits
from autobatch.equivalence.gradients import (
    Experiment,
    Gradients,
    Mends,
    Weigh,
    combined,
    differences,
)
from autobatch.equivalence.layers import OWN_LOSS, Layout
from autobatch.equivalence.result import Comparison, Culprit, Equivalence
from autobatch.equivalence.subject import Subject
from autobatch.equivalence.suspects import (
    changed_buffers,
    drawing_modules,
    interaction,
    layout_of,
    mixing_modules,
    stateful_modules,
    with_ignored_labels,
)
from autobatch.equivalence.weights import fitted_weights, shares, tried_weights
from autobatch.equivalence.windows import Choice
from autobatch.errors import UsageError

__all__ = ["TOLERANCES", "Investigation"]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
_AUTOCAST_TOLERANCE = 5e-2
_INTERACTIONS = {torch.float64: 1e-6, torch.float32: 1e-2}

_SEEDS = (9, 10, 11, 12)
"""Tried in turn: coins thrown once a batch may fall alike."""

_BATCHNORM = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True, slots=True)
class _Measured:
    """The gradients of an experiment, and how far they are apart."""

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
        subject: what is checked.
        weight: what a micro-batch counts by; its number of samples if None.
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

    def result(self, choice: Choice) -> Equivalence:
        """Compare the windows; where they differ from their batches, find the culprits.

        Raises:
            UsageError: the weights are negative or all zero.
            WorkloadError: there is no gradient to compare.
        """
        experiments = [
            Experiment(subject=self.subject, rows=rows, window=window)
            for window, rows in choice.windows
        ]
        free = held = [self._measured(each, Mends()) for each in experiments]
        drawing: list[str] = []
        if max(each.worst for each in free) > self.tolerance:
            drawing = drawing_modules(experiments[0])
            if drawing:
                held = [self._measured(each, Mends(draws=True)) for each in experiments]
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
            notes=(*choice.notes, *self.notes),
            seconds=0.0,
        )

    def _dtype(self) -> str:
        autocast = self.subject.workload.autocast
        name = str(self.subject.dtype).removeprefix("torch.")
        return name if autocast is None else f"{name} with {autocast} autocast"

    def _loss_kind(self, experiment: Experiment) -> str:
        copy = self.subject.copy()
        with torch.no_grad(), experiment.running(hold=True):
            copy.loss(copy.model, experiment.pieces()[0])
        return copy.loss_kind

    def _shares(self, experiment: Experiment) -> list[float]:
        if self.weight is None:
            return shares(experiment.window)
        weights = [float(self.weight(piece)) for piece in experiment.pieces()]
        if not (min(weights) >= 0 < sum(weights) < float("inf")):
            raise UsageError(
                f"weight(micro_batch) gives {weights}: use numbers of at least 0, not all of them 0"
            )
        return shares(weights)

    def _measured(self, experiment: Experiment, mends: Mends) -> _Measured:
        whole, parts = experiment.whole(mends), experiment.parts(mends)
        window = combined(parts, self._shares(experiment))
        return _Measured(whole, parts, differences(whole, window))

    def _investigate(self, experiment: Experiment, held: float, drawing: Sequence[str]) -> None:
        """Find the culprits of a window that differs by `held` while random draws are held."""
        mends = Mends(draws=True, state=True)
        if held <= self.tolerance:
            self._blame_draws(experiment, mends, drawing)
            return
        layout = layout_of(experiment)
        experiment = replace(experiment, layout=layout)
        layers = [name for name in mixing_modules(experiment, layout) if name != OWN_LOSS]
        mends = replace(mends, layers=frozenset(layers))
        if drawing:
            self._blame_draws(experiment, mends, drawing)
        mended = self._measured(experiment, mends)
        self._blame_layers(experiment, mends, layers, mended.whole)
        self._blame_state(experiment, mends, mended.parts, layout)
        if mended.worst > self.tolerance:
            self.culprits.append(self._of_the_loss(experiment, mends, mended, layout))

    def _blame_draws(self, experiment: Experiment, mends: Mends, drawing: Sequence[str]) -> None:
        drawn = replace(mends, draws=False)
        one = experiment.whole(drawn)
        others = (_apart(one, experiment.whole(drawn, seed)) for seed in _SEEDS)
        apart = next((apart for apart in others if apart > self.tolerance), 0.0)
        if apart > self.tolerance:
            self.culprits.append(culprits.random_draws(drawing, apart))

    def _blame_layers(
        self, experiment: Experiment, mends: Mends, layers: Sequence[str], mended: Gradients
    ) -> None:
        model = self.subject.copy().model
        norms = [name for name in layers if isinstance(model.get_submodule(name), _BATCHNORM)]
        others = [name for name in layers if name not in norms]
        for names, culprit in ((norms, culprits.batchnorm), (others, culprits.layer)):
            kept = replace(mends, layers=mends.layers.difference(names))
            apart = _apart(mended, experiment.whole(kept)) if names else 0.0
            if apart > self.tolerance:
                self.culprits.append(culprit(names, apart))

    def _blame_state(
        self,
        experiment: Experiment,
        mends: Mends,
        mended: Sequence[Gradients],
        layout: Layout,
    ) -> None:
        weights = self._shares(experiment)
        carried = experiment.parts(replace(mends, state=False))
        apart = _apart(combined(mended, weights), combined(carried, weights))
        buffers = changed_buffers(experiment)
        if apart > self.tolerance:
            names = stateful_modules(experiment, layout)
            self.culprits.append(culprits.state(names, apart, len(weights)))
        elif buffers:
            self.notes.append(
                f"every forward pass changes {count(len(buffers), 'buffer')} ({buffers[0]}), so "
                "once per micro-batch, not once per update; the gradient does not depend on that"
            )

    def _of_the_loss(
        self, experiment: Experiment, mends: Mends, mended: _Measured, layout: Layout
    ) -> Culprit:
        """Try other weights; then see whether samples interact."""
        for expression, weights in tried_weights(experiment.pieces()):
            if _apart(mended.whole, combined(mended.parts, weights)) <= self.tolerance:
                return culprits.wrong_weight(expression, weights, mended.worst)
        share = interaction(experiment, mends, layout)
        if share > _INTERACTIONS[self.subject.dtype]:
            return culprits.interacting_loss(share, mended.worst)
        fitted = fitted_weights(mended.whole, mended.parts)
        if _apart(mended.whole, combined(mended.parts, fitted)) <= self.tolerance:
            return culprits.unnamed_weight(fitted, mended.worst)
        return culprits.unexplained(mended.worst)

    def _try_ignored_labels(self, experiment: Experiment) -> None:
        """Say by what to weight where labels may be ignored, though none are in the sample."""
        for ignoring in with_ignored_labels(experiment):
            try:
                measured = self._measured(ignoring, Mends(draws=True))
            except Exception:  # most integers are no labels, and -100 is out of their range
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
