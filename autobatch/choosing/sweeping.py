"""One worker at a study: what it runs next, and what it keeps of it.

What the trials so far show to be too large, or slower and larger than another one, is pruned
without a run (`known.py`).

Invariant: a configuration runs only once the study has given its trial to this worker.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from autobatch.choosing.bench import Bench, Tried
from autobatch.choosing.held import Held
from autobatch.choosing.points import Points
from autobatch.choosing.samplers import BaseSampler, Point
from autobatch.choosing.space import AS_IT_IS, MICRO_BATCH, Configuration
from autobatch.choosing.study import SweepStudy
from autobatch.errors import AutobatchError, LeverError
from autobatch.levers.lever import WrongLeverError
from autobatch.records.progress import Progress, ProgressCallback
from autobatch.records.sweep import Outcome
from autobatch.support.wording import one_line

__all__ = ["Worker"]

_REPEATS = 30
"""After so many proposals in a row that need no run, a sampler has nothing new to propose."""

_AT_ONCE = 8
"""So many combinations of settings are gone through before the fastest so far is asked for."""

_WAIT_S = 0.2
"""Seconds between two looks at what other workers still run."""

_Combination = tuple[tuple[str, str], ...]


@dataclass(slots=True, kw_only=True)
class Worker:
    """One worker at a study.

    Attributes:
        points: what to choose from.
        every: the whole space, where it is gone through or could be counted; else None.
        bench: runs configurations.
        study: what all workers have tried.
        sampler: proposes configurations; None where the space is gone through whole.
        most: configurations that run at most; None for all of them.
        until: when no more are begun, by `time.perf_counter`; None for no such time.
        progress: told of each step.
        warnings: for who asked for the sweep.
        notes: the same, of what needs no deed.
    """

    points: Points
    every: Sequence[Point] | None
    bench: Bench
    study: SweepStudy
    sampler: BaseSampler | None
    most: int | None
    until: float | None
    progress: ProgressCallback
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def go(self) -> None:
        """Run configurations until all are known, or trials or time are up."""
        if self.sampler is None:
            assert self.every is not None
            self._whole(self.every)
            return
        self._whole(self.points.as_it_is(), stages=1)  # what the others are compared with
        self._sampled()
        if not self._is_over(self.look()):
            self._rest()

    def look(self) -> Held:
        """Read what the study holds."""
        return Held.by(self.study, self.bench.margin)

    def _whole(self, points: Sequence[Point], stages: int = 3, *, waits: bool = True) -> None:
        """Go through configurations, what matters most first, until none is left.

        Args:
            points: the configurations.
            stages: of `Known.next_size` that are gone through; 1 stops at the largest that fits.
            waits: whether to wait for what other workers run, which may be cut.
        """
        while True:
            held = self.look()
            taken = held.taken
            todo: dict[_Combination, dict[int, Point]] = {}
            pruned: list[tuple[Point, Mapping[str, Any]]] = []
            for point in points:
                if point.key in taken:
                    continue
                configuration = self.points.at(point.params)
                combination, size = configuration.combination, configuration.micro_batch
                reason = held.known.why_not(combination, size)
                if reason is None:
                    todo.setdefault(combination, {})[size] = point
                else:
                    pruned.append((point, {"reason": reason, **_facts(configuration)}))
            for point, facts in pruned:
                self.study.skip(point, facts)
            if pruned:  # others went on while this was written: look again
                continue
            chosen = self._next(held, todo, stages)
            if chosen is None and not (waits and held.running):
                return
            if self._is_over(held):
                return
            if chosen is None:
                self._tell(held, "waiting for what other workers run")
                time.sleep(_WAIT_S)
                continue
            id_ = self.study.claim(chosen, _facts(self.points.at(chosen.params)))
            if id_ is not None:
                self._run(held, id_, chosen.params)

    def _next(
        self, held: Held, todo: Mapping[_Combination, Mapping[int, Point]], stages: int
    ) -> Point | None:
        """Return the configuration to run next: of combinations that others are not at, first."""
        # one without a key has but some of its values: a sampler elsewhere is choosing the others
        running = (self.points.of(each.params) for each in held.running if each.key is not None)
        busy = {each.combination for each in running if isinstance(each, Configuration)}
        guess = held.known.guess()
        ranked = []
        for place, (combination, sizes) in enumerate(todo.items()):
            stage, size = held.known.next_size(combination, sorted(sizes, reverse=True), guess)
            if stage < stages:
                ranked.append((stage, combination in busy, place, sizes[size]))
        return min(ranked, key=lambda each: each[:3])[3] if ranked else None

    def _sampled(self) -> None:
        """Let the sampler propose configurations, until it has nothing new.

        Where what it proposes is known, the next micro-batch of the same combination runs instead.
        """
        repeats = 0
        while repeats < _REPEATS and not self._is_over(held := self.look()):
            repeats += 1
            id_, point = self.study.sample(self._suggest)
            configuration = self.points.of(point.params)
            if isinstance(configuration, str):
                if id_ is not None:
                    self._end(id_, point.params, "cannot be had", reason=configuration)
                continue
            reason = held.known.why_not(configuration.combination, configuration.micro_batch)
            if id_ is not None and reason is not None:
                self._end(id_, point.params, "pruned", reason=reason)
                id_ = None
            if id_ is None:
                other = self._other_size(held, point)
                if other is None or (id_ := self.study.claim(*other)) is None:
                    continue
                point = other[0]
            else:
                self.study.keep(id_, _facts(configuration))
            self._run(held, id_, point.params)
            repeats = 0

    def _suggest(self, trial: Any) -> None:
        """Ask a trial for its values, and put its configuration together: an error ends it."""
        self.points.space.suggest(trial)
        self.points.of(trial.params)

    def _other_size(self, held: Held, point: Point) -> tuple[Point, Mapping[str, Any]] | None:
        """Return the micro-batch to run of a combination that was proposed with one that is known.

        With it come the facts of the configuration; None where all of them are known.
        """
        taken = held.taken | {point.key}  # which another worker may have begun since that look
        open_: dict[int, tuple[Point, Configuration]] = {}
        for size in self.points.space.sizes:
            other = replace(point, params={**point.params, MICRO_BATCH: size})
            configuration = self.points.of(other.params)
            if (
                isinstance(configuration, Configuration)
                and other.key not in taken
                and held.known.why_not(configuration.combination, size) is None
            ):
                open_[size] = other, configuration
        if not open_:
            return None
        combination = next(iter(open_.values()))[1].combination
        _, size = held.known.next_size(combination, [*open_], held.known.guess())
        chosen, configuration = open_[size]
        return chosen, _facts(configuration)

    def _rest(self) -> None:
        """Go through what the sampler does not propose, the most like the fastest so far first.

        Of each combination the largest micro-batch that fits comes first, and the others once all
        combinations had their turn.
        """
        center: Mapping[str, Any] = {}
        for stages in (1, 3):
            came: set[str] = set()
            near: Iterator[tuple[str, list[Point]]] | None = None
            while not self._is_over(held := self.look()):
                fastest = _settings_of_fastest(held)
                if near is None or fastest != center:
                    near, center = self.points.near(fastest), fastest
                new = dict(islice((each for each in near if each[0] not in came), _AT_ONCE))
                if not new:
                    break
                came.update(new)
                had = self.points.had(point for points in new.values() for point in points)
                self._whole(had, stages, waits=False)
        if self.every is not None:
            self._whole(self.every)  # what other workers were at, and may have been cut
        elif not self._is_over(self.look()) and self.points.are_endless:
            self.notes.append(
                f"the sampler proposed nothing new {_REPEATS} times in a row; of numbers without a "
                "step, which levers of your own ask for, only those of the fastest were tried then"
            )

    def _run(self, held: Held, id_: int, params: Mapping[str, Any]) -> None:
        """Run a configuration whose trial is ours."""
        configuration = self.points.at(params)
        if configuration.failure is not None:
            self._end(id_, params, "failed", reason=configuration.failure)
            return
        self._tell(held, _label(configuration), configuration.micro_batch)
        with self.study.running(id_):
            try:
                tried = self._tried(configuration)
            except WrongLeverError:
                raise
            except LeverError as error:
                self._end(id_, params, "cannot be had", reason=str(error), executions=1)
                return
            except AutobatchError as error:
                self._end(id_, params, "failed", reason=one_line(error), executions=1)
                is_as_it_is = not configuration.options and not self.points.space.has_own
                if is_as_it_is and not held.finished:
                    raise  # no lever will mend that
                return
            self._end(
                id_,
                params,
                "finished" if tried.fits else "does not fit",
                reason=tried.reason,
                executions=tried.executions,
                simulations=tried.simulations,
                seconds=tried.seconds,
                reserved_bytes=tried.reserved_bytes,
            )

    def _tried(self, configuration: Configuration) -> Tried:
        try:
            return self.bench.run(configuration)
        finally:
            self.points.space.require_untouched(_label(configuration))

    def _end(
        self,
        id_: int,
        params: Mapping[str, Any],
        outcome: Outcome,
        *,
        reason: str | None,
        executions: int = 0,
        simulations: int = 0,
        seconds: float | None = None,
        reserved_bytes: int | None = None,
    ) -> None:
        """Keep what became of a trial."""
        facts = {
            "reason": reason,
            "executions": executions,
            "simulations": simulations,
            "reserved bytes": None if outcome == "finished" else reserved_bytes,
        }
        if outcome == "finished":
            assert seconds is not None and reserved_bytes is not None
            kept = self.study.finish(id_, (seconds, float(reserved_bytes)), facts)
        else:
            kept = self.study.prune(id_, outcome, facts)
        if not kept:
            self.warnings.append(
                f"a trial of {dict(params)} was taken for dead and given to another worker while "
                "it ran; its result is not used"
            )

    def _is_over(self, held: Held) -> bool:
        """Say whether trials or time are up."""
        is_late = self.until is not None and time.perf_counter() > self.until
        return is_late or (self.most is not None and held.runs >= self.most)

    def _tell(self, held: Held, what: str, micro_batch: int | None = None) -> None:
        done, expected = self.progressed(held)
        self.progress(
            Progress(
                step=what,
                executions=done,
                expected=max(expected, done + 1),
                micro_batch=micro_batch,
            )
        )

    def progressed(self, held: Held) -> tuple[int, int]:
        """Return how far the study is, and how far it goes: in runs where they are limited.

        Else it is in configurations, of which most need no run. The plan comes last.
        """
        if self.most is None:
            assert self.every is not None
            return sum(each.key in held.trials for each in self.every), len(self.every) + 1
        most = self.most if self.every is None else min(self.most, len(self.every))
        return held.runs - len(held.running), most + 1


def _settings_of_fastest(held: Held) -> Mapping[str, Any]:
    """Return the settings of the fastest trial so far; nothing where none finished."""
    if not held.finished:
        return {}
    params = held.params[min(held.finished, key=lambda trial: trial.seconds or 0).number]
    return {name: value for name, value in params.items() if name != MICRO_BATCH}


def _label(configuration: Configuration) -> str:
    changes = [f"{name}: {v}" for name, v in configuration.settings.items() if v != AS_IT_IS]
    return " + ".join(changes) or "as it is"


def _facts(configuration: Configuration) -> dict[str, Any]:
    """Return what a trial keeps of its configuration, beside its parameters."""
    return {
        "accumulation steps": configuration.split.accumulation_steps,
        "changes numerics": configuration.changes_numerics,
    }
