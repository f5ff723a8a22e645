"""The loss on batches with other counts: what equal counts hide, and which weight holds for all.

Invariant: a weight is named only if it is right for every variation that could be run. What fails
in a variation is no fault of the user's: the variation is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autobatch.equivalence.culprits import culprit
from autobatch.equivalence.experiment import Ablation, Experiment
from autobatch.equivalence.gradients import TOLERANCES, Measured
from autobatch.equivalence.lengths import LengthChange, length_changes
from autobatch.equivalence.numerics import Reads
from autobatch.equivalence.replay import AtOutputs, Replay
from autobatch.equivalence.result import Culprit
from autobatch.equivalence.subject import Subject
from autobatch.equivalence.variations import Variation, address, arrays, variations
from autobatch.equivalence.weights import SUM, tried_weights
from autobatch.errors import WorkloadError
from autobatch.support.wording import said_by
from autobatch.workload.sample import Rows

__all__ = ["FAILURES", "Counts"]

FAILURES = (Exception, SystemExit)
"""What the user's code may raise in an experiment that it was not written for."""

_SAME = 1e-9
"""Weights that are closer than this are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """What a variation has shown, without its gradients, which may be large.

    Attributes:
        variation: that was run.
        apart: the difference with the weights in use.
        fits: weights that were counted and with which the gradients agree, by their expression.
        fitted: such weights that come from the gradients alone; None if there are none.
    """

    variation: Variation
    apart: float
    fits: Mapping[str, Sequence[float]]
    fitted: Sequence[float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Apart:
    """A difference, and whether random numbers that were not given by sample may explain it."""

    apart: float
    is_random: bool = False


@dataclass(slots=True, kw_only=True)
class Counts:
    """The loss of one experiment, run on variations of its batch.

    Attributes:
        experiment: of the batch that was given.
        tolerance: the largest difference that rounding explains.
        light: the model in float32, where it takes too long to run in place of the loss alone;
            None for small models.
        runs_model: whether it may run at all: not where it makes a difference itself.
        reads: what the loss reads.
        replay: runs the loss by itself; None where it cannot.
        failed: the parts of the batch no variation of which could be run, and why.
    """

    experiment: Experiment
    tolerance: float
    light: Subject | None = None
    runs_model: bool = True
    reads: Reads = field(default_factory=Reads)
    replay: Replay | None = None
    failed: dict[str, str] = field(default_factory=dict)
    _ran: set[str] = field(default_factory=set)
    _agrees: bool | None = None

    @classmethod
    def of(cls, experiment: Experiment, tolerance: float, *, light: Subject | None) -> Counts:
        """Find out what the loss reads, by itself if possible."""
        found = cls(experiment=experiment, tolerance=tolerance, light=light)
        try:
            found.replay = Replay(experiment)
            found.replay.read(found.reads)
            return found
        except FAILURES:  # a loss may look into the model in ways that no record answers
            found.replay, found.reads = None, Reads()
        try:
            everything = experiment.rows.cut(0, experiment.rows.size)
            experiment.forward(everything, reads=found.reads)
        except FAILURES:
            found.reads = Reads()  # all parts are varied then
        return found

    def loss_alone(self) -> AtOutputs | None:
        """Return the gradients of the loss at the model's outputs; None if it cannot run so."""
        if self.replay is None:
            return None
        try:
            found = self.replay.gradients(self.experiment)
        except FAILURES:
            self.replay = None
            return None
        return found if found.outputs.whole else None

    def interaction(self, *, of_outputs: bool = False) -> float:
        """Return how much a sample's gradient depends on other samples' values; 0 if unknown.

        Args:
            of_outputs: whether the batch stays as it is: its floats may be weights that are right.
        """
        try:
            return 0.0 if self.replay is None else self.replay.interaction(of_outputs=of_outputs)
        except FAILURES:  # changed outputs may be none that the loss takes
            return 0.0

    def elsewhere(self) -> float:
        """Return the difference of a loss at outputs as training has them; 0 if unknown."""
        try:
            return 0.0 if self.replay is None else self.replay.elsewhere()
        except FAILURES:
            return 0.0

    def weights_of(self, loss: AtOutputs | Measured) -> tuple[str | None, Sequence[float]] | None:
        """Return the weights with which the loss of the batch agrees, and the name of what counts.

        The name is None where nothing that was counted gives such weights in other batches, too.
        None is returned if there are no such weights, or if the loss agrees as it is.
        """
        if loss.apart(self.experiment.shares()) <= self.tolerance:
            return None
        fits = self._fits(loss, self.experiment)
        held = self._holding(fits) if fits else []
        if held:
            return held[0], fits[held[0]]
        fitted = loss.fitted()
        return (None, fitted) if loss.apart(fitted) <= self.tolerance else None

    def hidden(self) -> tuple[list[Culprit], list[str]]:
        """Return culprits and notes of a loss that agrees because all samples have equal counts."""
        shown: list[_Shown] = []
        agreeing: list[tuple[Variation, set[str]]] = []
        if self.replay is None and not self.runs_model:
            return [], []  # what was found before would be found in every variation again
        for variation in variations(self.experiment.rows, self.reads):
            found = self._run(variation)
            if found is None:
                continue
            varied, loss, apart = found
            if apart > self.tolerance:
                fitted = loss.fitted()
                fits = loss.apart(fitted) <= self.tolerance
                shown.append(
                    _Shown(
                        variation=variation,
                        apart=apart,
                        fits=self._fits(loss, varied),
                        fitted=fitted if fits else None,
                    )
                )
            else:
                agreeing.append((variation, self._equal(varied)))
        known = [(one.variation, set(one.fits)) for one in shown] + agreeing
        names = _common([name for one in shown for name in one.fits], known)
        name = next((each for each in names if each != SUM), None)
        usual = _first_of_parts(one for one in shown if one.variation.is_usual)
        notes = [
            _unusual(one, name)
            for where, one in _first_of_parts(shown).items()
            if where not in usual
        ]
        notes += [
            f"{where} could not be varied ({error}): samples with unequal counts of it were not "
            "compared"
            for where, error in self.failed.items()
            if where not in self._ran
        ]
        blamed = list(usual.values())
        return [_hidden(one, name) for one in (blamed[:1] if name else blamed)], notes

    def of_lengths(self) -> tuple[list[Culprit], list[str]]:
        """Return culprits and notes of a model that agrees because all samples are equally long.

        That the loss agrees in all variations has been found before; here the model runs, too.
        """
        undecided: list[Culprit] = []
        failed: dict[str, str] = {}
        for change in length_changes(self.experiment.rows, self.experiment.ran.reads):
            if self.light is not None and self._are_labels(change):
                continue
            first = self._least(change, change.sides[0], failed)
            if first is None or first.apart <= self.tolerance:
                continue
            others = [self._least(change, side, {}) for side in change.sides[1:]]
            agrees = any(one is not None and one.apart <= self.tolerance for one in others)
            if not (agrees or first.is_random):
                return [culprit("hidden length", [change.where], first.apart)], _not_run(failed)
            cause = "undecided side" if agrees else "undecided length"
            undecided.append(culprit(cause, [change.where], first.apart))
        return undecided[:1], _not_run(failed)

    def _are_labels(self, change: LengthChange) -> bool:
        """Whether whole numbers are read by the loss, and so are hardly lengths for the model."""
        found = arrays(self.experiment.rows.batch)
        return all(
            path in found
            and found[path].numel() == self.experiment.rows.size
            and address(found[path]) in self.reads.storages
            for path in change.paths
        )

    def _least(
        self, change: LengthChange, side: Sequence[Callable[[], Rows]], failed: dict[str, str]
    ) -> _Apart | None:
        """Return the least difference of batches that say the same; None if none could run.

        Where one agrees, the others are batches that the data would not give.
        """
        least: _Apart | None = None
        for build in side:
            try:
                found = self._apart_in(build())
            except FAILURES as error:  # the model does not take such values
                if not change.is_guess:
                    failed.setdefault(change.where, said_by(error))
                continue
            if math.isfinite(found.apart) and (least is None or found.apart < least.apart):
                least = found
            if found.apart <= self.tolerance:
                break
        return least

    def _apart_in(self, rows: Rows) -> _Apart:
        """Return how far apart the whole gradients of a batch are.

        Where random numbers cannot be given by sample, because their shapes depend on the lengths,
        the model runs in evaluation mode.
        """
        varied = self._varied(rows)
        if self.light is not None:
            quick = varied.cast(self.light)
            if self._measured_apart(quick) <= TOLERANCES[self.light.dtype]:
                return _Apart(apart=0.0)
        apart = self._measured_apart(varied)
        if apart <= self.tolerance or not varied.ran.unmatched:
            return _Apart(apart=apart)
        still = self._varied(rows)
        without = self._measured_apart(still, Ablation(evaluated=True))
        if still.ran.unmatched:
            return _Apart(apart=apart, is_random=True)
        return _Apart(apart=without)

    def _varied(self, rows: Rows) -> Experiment:
        """Return the experiment on other rows, of which nothing was measured."""
        return Experiment(
            subject=self.experiment.subject,
            rows=rows,
            window=self.experiment.window,
            weight=self.experiment.weight,
        )

    def _measured_apart(self, varied: Experiment, ablation: Ablation | None = None) -> float:
        return varied.measured(ablation or Ablation()).apart(varied.shares())

    def _holding(self, fits: Mapping[str, Sequence[float]]) -> list[str]:
        """Return those of the weights that are right in every variation; none if none could run."""
        known: list[tuple[Variation, set[str]]] = []
        names = list(fits)
        for variation in variations(self.experiment.rows, self.reads):
            found = self._run(variation, is_known=False)
            if found is None:
                continue
            varied, loss, _ = found
            known.append((variation, set(self._fits(loss, varied, names))))
            if not _common(names, known):
                break
        return _common(names, known) if known else [name for name in names if name == SUM]

    def _run(
        self, variation: Variation, *, is_known: bool = True
    ) -> tuple[Experiment, AtOutputs | Measured, float] | None:
        """Return a varied experiment, its gradients and their difference; None if left out.

        Args:
            variation: to run.
            is_known: whether the loss agrees for the batch that was given, in whole gradients.
        """
        varied = self._varied(variation.rows)
        try:
            loss = self._gradients_of(varied)
            apart = loss.apart(varied.shares())
            if not math.isfinite(apart):
                return None  # as most losses are of NaN
            if is_known and apart > self.tolerance and not self._replay_agrees():
                self.replay = None
                return self._run(variation)
        except FAILURES as error:  # the loss does not take such values
            if not variation.is_guess:
                self.failed.setdefault(variation.where, said_by(error))
            return None
        self._ran.add(variation.where)
        return varied, loss, apart

    def _gradients_of(self, varied: Experiment) -> AtOutputs | Measured:
        """Return the gradients of a varied batch, at the outputs of the model if possible."""
        if self.replay is not None:
            try:
                return self.replay.gradients(varied)
            except FAILURES:  # the model's outputs may have other shapes for such values
                if self.light is not None:
                    raise
        if not self.runs_model:
            raise WorkloadError("the model makes a difference itself")
        return varied.measured(Ablation())

    def _replay_agrees(self) -> bool:
        """Whether the loss by itself agrees for the batch that was given, as whole gradients do."""
        if self.replay is None:
            return True
        if self._agrees is None:
            apart = self.replay.gradients(self.experiment).apart(self.experiment.shares())
            self._agrees = apart <= self.tolerance
        return self._agrees

    def _fits(
        self, loss: AtOutputs | Measured, experiment: Experiment, names: Sequence[str] | None = None
    ) -> dict[str, Sequence[float]]:
        """Return the weights that can be counted in a batch and with which its loss agrees."""
        few = loss.sampled()
        found: dict[str, Sequence[float]] = {}
        for name, weights in self._tried(experiment):
            if names is not None and name not in names:
                continue
            if few.apart(weights) <= self.tolerance and loss.apart(weights) <= self.tolerance:
                found.setdefault(name, weights)
        return found

    def _equal(self, experiment: Experiment) -> set[str]:
        """Return the names of weights that are those in use, with which a batch agrees."""
        used = experiment.shares()
        return {
            name
            for name, weights in self._tried(experiment)
            if all(abs(a - b) <= _SAME for a, b in zip(weights, used, strict=True))
        }

    def _tried(self, experiment: Experiment) -> Iterable[tuple[str, list[float]]]:
        """Return weights to try; a part that the loss does not read may fit by chance."""
        rows, read = self.experiment.rows, self.reads.storages
        unread = [
            path for path, part in arrays(rows.batch).items() if read and address(part) not in read
        ]
        conditions = self.reads.conditions
        return tried_weights(experiment.pieces(), rows.layout, conditions, unread=unread)


def _common(names: Sequence[str], known: Sequence[tuple[Variation, set[str]]]) -> list[str]:
    """Return the names that all usual variations allow, and the unusual ones if they leave any."""
    usual = [
        name
        for name in dict.fromkeys(names)
        if all(name in allowed for variation, allowed in known if variation.is_usual)
    ]
    return [name for name in usual if all(name in allowed for _, allowed in known)] or usual


def _first_of_parts(shown: Iterable[_Shown]) -> dict[str, _Shown]:
    found: dict[str, _Shown] = {}
    for one in shown:
        found.setdefault(one.variation.where, one)
    return found


def _unusual(one: _Shown, name: str | None) -> str:
    advice = f"pass weight=lambda batch: {name}" if name else "give its own weight"
    return (
        f"{one.variation.where} {one.variation.what}: the gradients differ by {one.apart:.2g}; if "
        f"your batches hold such values, {advice}"
    )


def _not_run(failed: Mapping[str, str]) -> list[str]:
    return [
        f"{where} could not be made shorter ({error}): samples of unequal lengths were not compared"
        for where, error in failed.items()
    ]


def _hidden(one: _Shown, name: str | None) -> Culprit:
    where = one.variation.where
    words = {"part": where, "what": one.variation.what}
    if name is not None:
        return culprit("hidden weight", [name], one.apart, words=words)
    weights = one.fitted or next(iter(one.fits.values()), None)
    if weights is None:
        return culprit("hidden loss", [where], one.apart, words=words)
    return culprit("hidden unnamed", [where], one.apart, weights=weights, words=words)
