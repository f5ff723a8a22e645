"""Compares windows with their batches in one dtype, and finds the culprits where they differ.

The loss is looked at first, at the outputs of the model, because that needs no pass through the
model. Then one possible cause after the other is removed and the gradients are compared again,
until only rounding is left. What a removal changes is the difference that this cause makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from autobatch.equivalence.compared_windows import ComparedWindows
from autobatch.equivalence.culprits import culprit
from autobatch.equivalence.experiment import Ablation, Experiment
from autobatch.equivalence.gradients import Gradients, Measured, Weigh, some, total
from autobatch.equivalence.gradients import apart as apart_of
from autobatch.equivalence.module_calls import LOSS
from autobatch.equivalence.replay import AtOutputs, Reads, Replay
from autobatch.equivalence.result import Comparison, Culprit, Equivalence
from autobatch.equivalence.seeds import seeds_of_other_code
from autobatch.equivalence.subject import Subject
from autobatch.equivalence.suspects import (
    changed_buffers,
    mixing_modules,
    recorded_run,
    stateful_modules,
)
from autobatch.equivalence.variations import Variation, variations
from autobatch.equivalence.weights import SUM, tried_weights
from autobatch.errors import WorkloadError
from autobatch.support.torch_private import BatchNorm
from autobatch.support.wording import count

__all__ = ["TOLERANCES", "Investigation"]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
"""What rounding explains; in float32 it is measured, and this is the most that is believed."""

_ROUNDINGS = 10.0
"""How many times the rounding that was measured once is allowed."""

_LEAST_ROUNDING = 1e-6
_NOISE = 4 * torch.finfo(torch.float32).eps
_INTERACTION = 1e-6
_OF_THE_LOSS = ("weight", "loss", "unexplained")
"""Kinds of culprits with which a loss differs in every variation of the batch."""

_FREE_SEEDS = (100, 200, 300, 400)
"""Seeds tried in turn: with few draws in a batch, two seeds may draw the same numbers."""


_Named = tuple[str | None, list[float]]
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
    _replay: Replay | None = None
    _reads: Reads = field(default_factory=Reads)
    _agrees: bool | None = None

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
        for seed in seeds_of_other_code(smallest):
            ablation = Ablation(seed=seed)
            held.append((self._held(smallest, ablation), smallest, ablation))
        worst, experiment, ablation = max(held, key=lambda one: one[0])
        free = {id(each): self._free(each, base, worst) for each in experiments}
        differs = worst > self.tolerance
        if differs and experiment.ran.unmatched:
            continued = [
                (self._held(each, replace(how, continued=True)), each, how) for _, each, how in held
            ]
            if max(apart for apart, _, _ in continued) <= self.tolerance:
                held, differs = continued, False
        if differs:
            self._investigate(experiment, ablation)
        if not any(each.kind in _OF_THE_LOSS for each in self.culprits):
            self._vary(experiments[-1])
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

    def _held(self, experiment: Experiment, ablation: Ablation) -> float:
        """Return the difference where micro-batches have their rows of the batch's draws."""
        apart = experiment.measured(ablation).apart(experiment.shares())
        return max(apart, experiment.ran.apart)

    def _rounding(self, experiment: Experiment, only_above: float | None) -> float:
        """Return what rounding explains; in float32, from parameters that are changed by theirs."""
        most = TOLERANCES[self.subject.dtype]
        if self.subject.dtype == torch.float64 or only_above is not None:
            return most
        moved = experiment.whole(Ablation(noise=_NOISE))
        apart = apart_of(experiment.whole(Ablation()), moved)
        return min(max(_ROUNDINGS * apart, _LEAST_ROUNDING), most)

    def _free(self, experiment: Experiment, base: Ablation, worst: float) -> dict[str, float]:
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
        loss = self._loss_alone(experiment)
        named = None if loss is None else self._weights_of(loss, experiment)
        if named is not None and named[0] is None and self._interaction() > _INTERACTION:
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
        if loss is None or (named is None and loss.apart(experiment.shares()) <= self.tolerance):
            named = self._weights_of(ablated, experiment)
        if named is not None:
            self.culprits.append(self._weight(named, rest))
            if ablated.apart(named[1]) <= self.tolerance:
                return
        share = self._interaction()
        differs = loss is not None and loss.apart(experiment.shares()) > self.tolerance
        if named is None and differs and share > _INTERACTION:
            self.culprits.append(culprit("loss", [LOSS], rest, share=share))
        elif experiment.ran.unmatched and not differs:
            self.culprits.append(culprit("undecided", experiment.ran.drawing, rest))
        else:
            self.culprits.append(culprit("unexplained", [], rest))

    # The loss by itself

    def _loss_alone(self, experiment: Experiment) -> AtOutputs | None:
        """Return the gradients of the loss at the model's outputs; None if it cannot run so."""
        try:
            self._replay = Replay(experiment)
            found = self._replay.gradients(experiment.rows, self._reads)
        except Exception:  # a loss may look into the model in ways that no record answers
            self._replay = None
            return None
        return found if found.outputs.whole else None

    def _interaction(self) -> float:
        try:
            return 0.0 if self._replay is None else self._replay.interaction()
        except Exception:  # changed outputs may be none that the loss takes
            return 0.0

    def _weights_of(self, loss: AtOutputs | Measured, experiment: Experiment) -> _Named | None:
        """Return the weights of the micro-batches with which a loss agrees, and their name.

        None if there are no such weights, or if it agrees as it is.
        """
        if loss.apart(experiment.shares()) <= self.tolerance:
            return None
        layout = experiment.rows.layout
        for name, weights in tried_weights(experiment.pieces(), layout, self._reads.constants):
            if loss.apart(weights) <= self.tolerance:
                return name, weights
        fitted = loss.fitted()
        return (None, fitted) if loss.apart(fitted) <= self.tolerance else None

    def _weight(self, named: _Named, apart: float) -> Culprit:
        name, weights = named
        if name == SUM:
            return culprit("sum", [LOSS], apart)
        if name is None:
            return culprit("unnamed weight", [LOSS], apart, weights=weights)
        return culprit("weight", [name], apart, weights=weights)

    # What the sample leaves open

    def _vary(self, experiment: Experiment) -> None:
        """Blame a loss that agrees only because all samples have the same count of something."""
        if self._replay is None or self._replay.experiment is not experiment:
            self._reads, self._agrees = Reads(), None
            try:
                self._replay = Replay(experiment)
                self._replay.read(self._reads)
            except Exception:  # a loss may look into the model in ways that no record answers
                self._replay, self._reads = None, Reads()
                experiment.forward(
                    experiment.rows.cut(0, experiment.rows.size), constants=self._reads.constants
                )
        blamed: set[str] = set()
        unusual: dict[str, str] = {}
        for variation in variations(experiment.rows, self._reads):
            if variation.where in blamed or (variation.where in unusual and not variation.is_usual):
                continue
            found = self._of_variation(experiment, variation)
            if isinstance(found, Culprit):
                self.culprits.append(found)
                blamed.add(variation.where)
            elif found is not None:
                unusual[variation.where] = found
        self.notes += [note for where, note in unusual.items() if where not in blamed]

    def _gradients_of(self, varied: Experiment) -> AtOutputs | Measured:
        """Return the gradients of a varied batch, at the outputs of the model if possible."""
        if self._replay is not None:
            try:
                return self._replay.gradients(varied.rows)
            except Exception:  # the model's outputs may have other shapes for such values
                if self.light is not None:
                    raise
        if any(each.kind != "random" for each in self.culprits):
            raise WorkloadError("what was found before would be found in every variation again")
        return varied.measured(Ablation())

    def _replay_agrees(self, experiment: Experiment) -> bool:
        """Whether the loss by itself agrees for the batch that was given, as whole gradients do."""
        assert self._replay is not None
        if self._agrees is None:
            apart = self._replay.gradients(experiment.rows).apart(experiment.shares())
            self._agrees = apart <= self.tolerance
        return self._agrees

    def _of_variation(self, experiment: Experiment, variation: Variation) -> Culprit | str | None:
        """Return a culprit if a variation shows one, or a note if such batches are unusual."""
        varied = _varied(experiment, variation)
        try:
            loss, shares = self._gradients_of(varied), varied.shares()
        except Exception:  # the loss does not take such values
            return None
        apart = loss.apart(shares)
        if not self.tolerance < apart < float("inf"):
            return None
        if isinstance(loss, AtOutputs) and not self._replay_agrees(experiment):
            self._replay = None
            return self._of_variation(experiment, variation)
        name, weights = self._weights_of(loss, varied) or ("", [])
        words = {"part": variation.where, "what": variation.what}
        if not variation.is_usual:
            advice = f"pass weight=lambda batch: {name}" if name else "give its own weight"
            return (
                f"{variation.where} {variation.what}: the gradients differ by {apart:.2g}; if your "
                f"batches hold such values, {advice}"
            )
        if name == "":
            return culprit("hidden loss", [variation.where], apart, words=words)
        if name is None or name == SUM:
            cause = "hidden unnamed"
            return culprit(cause, [variation.where], apart, weights=weights, words=words)
        return culprit("hidden weight", [name], apart, words=words)


def _varied(experiment: Experiment, variation: Variation) -> Experiment:
    """Return an experiment on a varied batch, of which nothing was measured yet."""
    return Experiment(
        subject=experiment.subject,
        rows=variation.rows,
        window=experiment.window,
        weight=experiment.weight,
    )
