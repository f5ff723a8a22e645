"""Compares windows with their batches in one dtype, and finds the culprits where they differ.

The loss is looked at first, at the outputs of the model, because that needs no pass through the
model. Then one possible cause after the other is removed and the gradients are compared again,
until only rounding is left. What a removal changes is the difference that this cause makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from autobatch.equivalence.compared_windows import ComparedWindows
from autobatch.equivalence.counts import FAILURES, Counts
from autobatch.equivalence.culprits import culprit
from autobatch.equivalence.experiment import Ablation, Experiment
from autobatch.equivalence.gradients import (
    TOLERANCES,
    Gradients,
    Measured,
    Weigh,
    some,
    total,
)
from autobatch.equivalence.gradients import apart as apart_of
from autobatch.equivalence.module_calls import LOSS
from autobatch.equivalence.replay import AtOutputs
from autobatch.equivalence.result import Comparison, Culprit, Equivalence
from autobatch.equivalence.seeds import seeds_of_other_code
from autobatch.equivalence.subject import Subject
from autobatch.equivalence.suspects import (
    changed_buffers,
    mixing_modules,
    recorded_run,
    stateful_modules,
)
from autobatch.equivalence.weights import SUM
from autobatch.support.torch_private import BatchNorm
from autobatch.support.wording import count, said_by

__all__ = ["Investigation"]

_ROUNDINGS = 10.0
"""How many times the rounding that was measured once is allowed."""

_LEAST_ROUNDING = 1e-6
_NOISE = 4 * torch.finfo(torch.float32).eps
_INTERACTION = 1e-6
_OF_THE_LOSS = ("weight", "loss", "unexplained")
"""Kinds of culprits with which a loss differs in every variation of the batch."""

_FREE_SEEDS = (100, 200, 300, 400)
"""Seeds tried in turn: with few draws in a batch, two seeds may draw the same numbers."""


_T = TypeVar("_T")

_Named = tuple[str | None, Sequence[float]]
"""Weights of micro-batches, and the expression that counts them; None where none was found."""


@dataclass(slots=True, kw_only=True)
class Investigation:
    """One check in one floating-point type.

    Attributes:
        subject: the model and loss under test.
        weight: the weight of a micro-batch; its number of samples if None.
        light: the same in float32, for what needs no exact number; None for small models.
        tolerance: the largest difference that rounding explains.
        culprits, notes: what has been found so far.
    """

    subject: Subject
    weight: Weigh | None
    light: Subject | None = None
    tolerance: float = 0.0
    culprits: list[Culprit] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _counts: Counts | None = None

    def result(
        self, compared: ComparedWindows, *, only_above: float | None = None
    ) -> Equivalence | None:
        """Compare the windows with their batches, and find the culprits where they differ.

        Args:
            compared: the windows.
            only_above: return None unless the gradients differ by more than this.

        Raises:
            UsageError: the weights are negative or all zero.
            WorkloadError: there is no gradient to compare.
        """
        experiments = [
            Experiment(subject=self.subject, rows=rows, window=window, weight=self.weight)
            for window, rows in compared.windows
        ]
        base = Ablation()
        held = [(self._held(each, base), each, base) for each in experiments]
        if only_above is not None and max(apart for apart, _, _ in held) <= only_above:
            return None
        self.tolerance = self._rounding(experiments[-1], only_above)
        smallest = min(experiments, key=lambda each: each.rows.size)
        held += self._tried(
            "the comparison with other random numbers", lambda: self._seeded(smallest), []
        )
        worst, experiment, ablation = max(held, key=lambda one: one[0])
        free = {id(each): self._free_or_held(each, base) for each in experiments}
        differs = worst > self.tolerance
        if differs and experiment.ran.unmatched:
            continued = self._tried(
                "the comparison in which Python's random numbers go on",
                lambda: [
                    (self._held(each, replace(how, continued=True)), each, how)
                    for _, each, how in held
                ],
                held,
            )
            if max(apart for apart, _, _ in continued) <= self.tolerance:
                held, differs = continued, False
        if differs:
            self._tried(
                "the search for a cause", lambda: self._investigate(experiment, ablation), None
            )
        if not any(each.kind in _OF_THE_LOSS for each in self.culprits):
            self._tried(
                "the comparison of unequal counts", lambda: self._vary(experiments[-1]), None
            )
        kinds = {each.kind for each in self.culprits} - {"random"}
        if differs and not kinds:
            self.culprits.append(culprit("unexplained", [], worst))
        equivalent = None if kinds == {"undecided"} else not (kinds or differs)
        return Equivalence(
            equivalent=equivalent,
            model=type(self.subject.workload.model).__name__,
            loss=experiments[0].ran.loss_kind,
            weight="its number of samples" if self.weight is None else "the weight given",
            dtype=str(self.subject.dtype).removeprefix("torch."),
            tolerance=self.tolerance,
            comparisons=tuple(
                Comparison(
                    window=each.window,
                    difference=max(free[id(each)].values()),
                    held_difference=max(apart for apart, one, _ in held if one is each),
                )
                for each in experiments
            ),
            parameters=max(free.values(), key=lambda each: max(each.values())),
            culprits=tuple(self.culprits),
            notes=(*compared.notes, *self.notes),
            seconds=0.0,
        )

    def _seeded(self, experiment: Experiment) -> list[tuple[float, Experiment, Ablation]]:
        """Return the differences with seeds that make the model run other code."""
        ablations = [Ablation(seed=seed) for seed in seeds_of_other_code(experiment)]
        return [(self._held(experiment, each), experiment, each) for each in ablations]

    def _free_or_held(self, experiment: Experiment, base: Ablation) -> dict[str, float]:
        held = experiment.measured(base).differences(experiment.shares())
        what = "the comparison with draws as in training"
        return self._tried(what, lambda: self._free(experiment, base), held)

    def _held(self, experiment: Experiment, ablation: Ablation) -> float:
        """Return the difference where micro-batches have their rows of the batch's draws."""
        apart = experiment.measured(ablation).apart(experiment.shares())
        return max(apart, experiment.ran.apart)

    def _rounding(self, experiment: Experiment, only_above: float | None) -> float:
        """Return what rounding explains; in float32, from parameters that are changed by theirs."""
        most = TOLERANCES[self.subject.dtype]
        if self.subject.dtype == torch.float64 or only_above is not None:
            return most
        try:
            moved = experiment.whole(Ablation(noise=_NOISE))
        except FAILURES:
            return most
        apart = apart_of(experiment.whole(Ablation()), moved)
        return min(max(_ROUNDINGS * apart, _LEAST_ROUNDING), most)

    def _free(self, experiment: Experiment, base: Ablation) -> dict[str, float]:
        """Return the differences with draws as in training, and blame the draws where they differ.

        Where nothing draws, these are the differences that were measured already.
        """
        shares, held = experiment.shares(), experiment.measured(base)
        drawing = experiment.ran.drawing
        found = held.differences(shares)
        tried = experiment if self.light is None else experiment.cast(self.light)
        for seed in _FREE_SEEDS if drawing else ():
            parts = tried.parts(replace(base, other_draws=seed))
            apart = self._window_apart(held.parts, parts, shares)
            if apart > max(self.tolerance, TOLERANCES[tried.subject.dtype]):
                found = Measured(whole=held.whole, parts=parts).differences(shares)
                if not any(each.kind == "random" for each in self.culprits):
                    self.culprits.append(culprit("random", drawing, apart))
                break
        return found

    def _window_apart(
        self, one: Sequence[Gradients], other: Sequence[Gradients], weights: Sequence[float]
    ) -> float:
        """Return how far two windows are apart, by some of their entries."""
        return apart_of(
            total(list(map(some, one)), weights), total(list(map(some, other)), weights)
        )

    def _investigate(self, experiment: Experiment, base: Ablation) -> None:
        """Find the culprits of a window that differs with the draws of the whole batch."""
        tolerance = self.tolerance
        if experiment.ran.hooked:
            base = self._blame_hooks(experiment, base)
        shares = experiment.shares()
        measured = experiment.measured(base)
        worst = measured.apart(shares)
        if worst <= tolerance:
            return
        counts = self._counts_of(experiment)
        counts.runs_model = False  # layers are not removed there
        loss = counts.loss_alone()
        named = None if loss is None else counts.weights_of(loss)
        if named is not None and named[0] is None and counts.interaction() > _INTERACTION:
            named = None  # whatever scales a whole micro-batch can be fitted, such as a root
        if named is not None and measured.apart(named[1]) <= tolerance:
            self.culprits.append(self._weight(named, worst))
            return
        self._investigate_model(experiment, base, loss, named)

    def _blame_hooks(self, experiment: Experiment, base: Ablation) -> Ablation:
        """Blame hooks of gradients if the difference changes without them; go on without them."""
        bare, shares = replace(base, hooks=True), experiment.shares()
        apart = experiment.measured(base).apart(shares)
        ran = experiment.ran
        if abs(apart - experiment.measured(bare).apart(shares)) > self.tolerance:
            cause = "step" if ran.steps else "hook"
            self.culprits.append(culprit(cause, ran.hooked, apart))
        return bare

    def _investigate_model(
        self,
        experiment: Experiment,
        base: Ablation,
        loss: AtOutputs | None,
        named: _Named | None,
    ) -> None:
        """Remove layers, then state; what is left is the loss, or not explained."""
        tolerance, shares = self.tolerance, experiment.shares()
        recorded = experiment.calls = recorded_run(experiment, base.seed)
        layers = [name for name in mixing_modules(experiment, recorded, base.seed) if name != LOSS]
        ablation = replace(base, layers=frozenset(layers))
        whole, parts = experiment.whole(ablation), experiment.parts(base)
        self._blame_layers(experiment, ablation, layers, whole)
        weights = shares if named is None else named[1]
        ablated = Measured(whole=whole, parts=parts).sampled()
        if min(ablated.apart(shares), ablated.apart(weights)) > tolerance:
            still = experiment.parts(replace(base, state=True))
            apart = self._window_apart(still, parts, shares)
            if apart > tolerance:
                names = stateful_modules(experiment, recorded, base.seed)
                self.culprits.append(culprit("state", names, apart, steps=len(shares)))
            ablated = Measured(whole=whole, parts=still).sampled()
        self._note_buffers(experiment)
        rest = ablated.apart(shares)
        if rest > tolerance:
            self._blame_loss(experiment, ablated, loss, named, rest)

    def _blame_layers(
        self, experiment: Experiment, ablation: Ablation, layers: Sequence[str], ablated: Gradients
    ) -> None:
        model = self.subject.replica().model
        norms = [name for name in layers if isinstance(model.get_submodule(name), BatchNorm)]
        others = [name for name in layers if name not in norms]
        for names, cause in ((norms, "batchnorm"), (others, "layer")):
            kept = replace(ablation, layers=ablation.layers.difference(names))
            apart = apart_of(ablated, experiment.whole(kept)) if names else 0.0
            if apart > self.tolerance:
                self.culprits.append(culprit(cause, names, apart))

    def _note_buffers(self, experiment: Experiment) -> None:
        if any(each.kind == "state" for each in self.culprits):
            return
        if buffers := changed_buffers(experiment):
            self.notes.append(
                f"every forward pass changes {count(len(buffers), 'buffer')} ({buffers[0]}), so "
                "once per micro-batch, not once per update; the gradient does not depend on that"
            )

    def _blame_loss(
        self,
        experiment: Experiment,
        ablated: Measured,
        loss: AtOutputs | None,
        named: _Named | None,
        rest: float,
    ) -> None:
        """Name what is left once layers and state are removed."""
        counts = self._counts_of(experiment)
        if loss is None or (named is None and loss.apart(experiment.shares()) <= self.tolerance):
            counts.runs_model = all(each.kind == "random" for each in self.culprits)
            named = counts.weights_of(ablated)
        if named is not None:
            self.culprits.append(self._weight(named, rest))
            if ablated.apart(named[1]) <= self.tolerance:
                return
        share = counts.interaction()
        differs = loss is not None and loss.apart(experiment.shares()) > self.tolerance
        if named is None and differs and share > _INTERACTION:
            self.culprits.append(culprit("loss", [LOSS], rest, share=share))
        elif experiment.ran.unmatched and not differs:
            self.culprits.append(culprit("undecided", experiment.ran.drawing, rest))
        else:
            self.culprits.append(culprit("unexplained", [], rest))

    def _weight(self, named: _Named, apart: float) -> Culprit:
        name, weights = named
        if name == SUM:
            return culprit("sum", [LOSS], apart)
        if name is None:
            return culprit("unnamed weight", [LOSS], apart, weights=weights)
        return culprit("weight", [name], apart, weights=weights)

    # What the sample leaves open

    def _vary(self, experiment: Experiment) -> None:
        """Blame a loss that agrees by chance, or because all samples have equal counts."""
        counts = self._counts_of(experiment)
        counts.runs_model = all(each.kind == "random" for each in self.culprits)
        culprits, notes = counts.hidden()
        if counts.runs_model and not culprits:
            culprits, more = counts.of_lengths()
            notes = [*notes, *more]
        if counts.runs_model and not (culprits or experiment.ran.unmatched):
            share = counts.interaction(of_outputs=True)
            if share > _INTERACTION:
                culprits = [culprit("loss", [LOSS], share, share=share)]
            elif (apart := counts.elsewhere()) > max(self.tolerance, _INTERACTION):
                # a weight that is right at the outputs of now is no advice
                culprits, notes = [culprit("hidden outputs", [LOSS], apart)], []
        self.culprits += culprits
        self.notes += notes

    def _counts_of(self, experiment: Experiment) -> Counts:
        if self._counts is None or self._counts.experiment is not experiment:
            self._counts = Counts.of(experiment, self.tolerance, light=self.light)
        return self._counts

    def _tried(self, what: str, run: Callable[[], _T], otherwise: _T) -> _T:
        """Run an experiment of the check's own; if it fails, leave it out and say so."""
        try:
            return run()
        except FAILURES as error:
            self.notes.append(f"{what} failed and was left out: {said_by(error)}")
            return otherwise
