"""Configurations in an Optuna study that several processes share.

No configuration is run twice. A worker writes a running trial that holds the whole configuration,
and only then reads the study: of two trials with one configuration the earlier one has it, and the
other worker withdraws. Storages give trials their ids in the order in which they become visible
(SQLite and the journal file write one at a time, other databases lock the study's row), and a trial
is written with its configuration in one transaction, so no two workers can both find themselves
first. Optuna's own queue (`enqueue_trial`) promises that for journals, but not for SQLite, which
knows no row locks. Where a sampler proposes, the trial is there before its configuration is:
whoever comes later waits until the earlier ones have chosen, as in Lamport's bakery.

The trial of a worker that died (`workers.py`) counts as cut, and its configuration is run again.

Invariant: what is finished, pruned or failed in the study is never run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from autobatch.choosing.samplers import BaseSampler, Point, Trial, quiet
from autobatch.choosing.storages import (
    BaseStorage,
    anew,
    differences,
    opening,
    reaching,
    storage_named,
    storage_of,
)
from autobatch.choosing.workers import Workers, beating
from autobatch.errors import AutobatchError, UsageError
from autobatch.support.wording import one_line

__all__ = ["Seen", "SweepStudy"]

_METRICS = ["seconds of a window", "bytes reserved"]

_CHOOSING_S = 0.02
"""Seconds between two looks at earlier trials that have no configuration yet."""

_FINISHED: type[Exception] = getattr(optuna.exceptions, "UpdateFinishedTrialError", RuntimeError)
"""What storages raise when a trial that has ended is changed; RuntimeError in older Optunas."""

_QUESTION, _WORKER, _BEAT, _POINT, _OUTCOME = (
    "question",
    "worker",
    "beat",
    "configuration",
    "outcome",
)
_CUT, _WITHDRAWN = "cut", "withdrawn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A trial as the study holds it.

    Attributes:
        id: of the storage; trials that came later have larger ones.
        number: in the study.
        key: of its configuration; None where it has none yet.
        params: the configuration.
        is_running: whether a worker that lives is at it.
        is_cut: whether its worker died while it ran.
        is_done: whether its configuration needs no run any more.
        facts: what was kept with it.
        values: seconds and bytes, where it finished.
    """

    id: int
    number: int
    key: str | None
    params: Mapping[str, Any]
    is_running: bool
    is_cut: bool
    is_done: bool
    facts: Mapping[str, Any]
    values: tuple[float, float] | None

    def has(self, key: str) -> bool:
        """Say whether a configuration is this trial's, so that no other may run it."""
        return self.key == key and (self.is_running or self.is_done)


@dataclass(slots=True)
class SweepStudy:
    """A study of Optuna with two objectives, seconds and bytes, both to be small."""

    name: str
    where: str | None
    _study: optuna.Study
    _storage: BaseStorage
    _study_id: int
    _digest: str
    _workers: Workers = field(default_factory=Workers)

    @classmethod
    def open(
        cls,
        storage: str | os.PathLike[str] | BaseStorage | None,
        name: str,
        question: Mapping[str, Any],
        *,
        sampler: BaseSampler | None = None,
    ) -> SweepStudy:
        """Open a study, or begin it.

        Args:
            storage: a URL such as `sqlite:///sweep.db`, the path of a journal file, a storage of
                Optuna, or None for the memory of this process.
            name: of the study in it.
            question: what the study is to answer, in plain values that JSON holds.
            sampler: proposes configurations; None is Optuna's default.

        Raises:
            FileError: the storage cannot be opened.
            UsageError: the study is there, and was made for another question.
        """
        if not isinstance(name, str) or not name:
            raise UsageError(f"study is {name!r}: give its name as text")
        where = None if storage is None else storage_named(storage)
        asked = json.loads(json.dumps(question))
        with quiet(), opening(where):
            opened = storage_of(storage)
            study = optuna.create_study(
                study_name=name,
                storage=opened,
                sampler=sampler,
                directions=["minimize", "minimize"],
                load_if_exists=True,
            )
            known = study.user_attrs.get(_QUESTION)
            is_fresh = known is None and not study.get_trials(deepcopy=False)
            if is_fresh:
                study.set_user_attr(_QUESTION, asked)
                study.set_metric_names(_METRICS)
                known = study.user_attrs[_QUESTION]
        if known is None or len(study.directions) != 2:
            raise UsageError(f"the study {name!r} in {where} is none of a sweep: {anew(where)}")
        if known != asked:
            raise UsageError(
                f"the study {name!r} in {where} is about another training run "
                f"({differences(known, asked)}): {anew(where)}"
            )
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        study_id = opened.get_study_id_from_name(name)
        return cls(name, where, study, opened, study_id, digest)

    def seen(self) -> list[Seen]:
        """Return the trials that have or may get a configuration, in their order."""
        with reaching(self.where):
            trials = self._study.get_trials(deepcopy=False)
        return [self._seen(trial) for trial in trials if not self._is_void(trial)]

    def claim(self, point: Point, facts: Mapping[str, Any]) -> int | None:
        """Begin a trial of a configuration, and return its id; None where another has it.

        Args:
            point: the configuration.
            facts: what to keep with it.
        """
        if any(each.has(point.key) for each in self.seen()):
            return None  # which saves a trial that would be withdrawn
        id_ = self._create(point, TrialState.RUNNING, {_WORKER: self._workers.me, **facts})
        return id_ if self._is_first(id_, point.key) else None

    def skip(self, point: Point, facts: Mapping[str, Any]) -> None:
        """Keep a configuration that needs no run, with facts that say why.

        Two workers that find so at the same instant may both write it, which costs nothing.
        """
        self._create(point, TrialState.PRUNED, {_OUTCOME: "pruned", **facts})

    def sample(self, suggest: Callable[[Trial], object]) -> tuple[int | None, Point]:
        """Let the sampler propose a configuration, and begin its trial.

        Args:
            suggest: asks the trial for the value of each parameter.

        Returns:
            The trial's id, or None where another has its configuration; and the configuration.
        """
        with quiet(), reaching(self.where), self._sampling():
            trial = self._study.ask()
            id_ = self._storage.get_trial_id_from_study_id_trial_number(
                self._study_id, trial.number
            )
            self.keep(id_, {_WORKER: self._workers.me, _QUESTION: self._digest})
            try:
                suggest(trial)
            except BaseException:
                self._void(id_, _CUT)
                raise
        point = Point(params=trial.params, distributions=trial.distributions)
        self.keep(id_, {_POINT: point.key})
        return (id_ if self._is_first(id_, point.key) else None), point

    @contextlib.contextmanager
    def _sampling(self) -> Iterator[None]:
        """Say of a sampler that cannot propose what is asked for that it is the wrong one."""
        try:
            yield
        except AutobatchError:
            raise
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise UsageError(
                f"the {type(self._study.sampler).__name__} cannot propose configurations "
                f"({one_line(error)}): use a sampler for two objectives and categories, such as tpe"
            ) from error

    @contextlib.contextmanager
    def running(self, id_: int) -> Iterator[None]:
        """Give signs of life while the block runs; where it raises, the trial counts as cut.

        A trial that has ended by then stays what it is.
        """
        try:
            with beating(lambda count: self._storage.set_trial_user_attr(id_, _BEAT, count)):
                yield
        except BaseException:
            self._void(id_, _CUT)
            raise

    def finish(self, id_: int, values: tuple[float, float], facts: Mapping[str, Any]) -> bool:
        """End a trial with its seconds and bytes; False where others had taken it for dead."""
        return self._end(id_, TrialState.COMPLETE, values, {_OUTCOME: "finished", **facts})

    def prune(self, id_: int, outcome: str, facts: Mapping[str, Any]) -> bool:
        """End a trial without values: it does not fit, need not run, or failed.

        Samplers of Optuna take it for worse than all that finished; FAIL, which they ignore, is for
        trials that hold no configuration.
        """
        return self._end(id_, TrialState.PRUNED, None, {_OUTCOME: outcome, **facts})

    def release_cut(self, seen: Iterable[Seen]) -> None:
        """Count those as cut whose workers died, so that their configurations are run again."""
        for each in seen:
            if each.is_cut:
                self._void(each.id, _CUT)

    def keep(self, id_: int, facts: Mapping[str, Any]) -> None:
        """Write facts to a trial; None and 0 are left out, as each is a write."""
        for name, value in _written(facts).items():
            self._storage.set_trial_user_attr(id_, name, value)

    def _create(self, point: Point, state: TrialState, facts: Mapping[str, Any]) -> int:
        """Write a trial with its whole configuration in one transaction, and return its id."""
        trial = optuna.create_trial(
            state=state,
            params=dict(point.params),
            distributions=dict(point.distributions),
            user_attrs=_written({_QUESTION: self._digest, _POINT: point.key, **facts}),
        )
        with reaching(self.where):
            return self._storage.create_new_trial(self._study_id, template_trial=trial)

    def _seen(self, trial: FrozenTrial) -> Seen:
        id_, facts = trial._trial_id, trial.user_attrs
        has_begun = trial.state == TrialState.RUNNING
        lives = has_begun and self._workers.lives(id_, facts.get(_WORKER, {}), facts.get(_BEAT, 0))
        return Seen(
            id=id_,
            number=trial.number,
            key=facts.get(_POINT),
            params=trial.params,
            is_running=lives,
            is_cut=has_begun and not lives,
            is_done=trial.state.is_finished(),
            facts=facts,
            values=(trial.values[0], trial.values[1]) if trial.values else None,
        )

    def _is_void(self, trial: FrozenTrial) -> bool:
        """Say whether a trial holds no configuration: it was cut, withdrawn, or is another's."""
        asked = trial.user_attrs.get(_QUESTION)
        if asked is not None and asked != self._digest:
            raise UsageError(
                f"trial {trial.number} of the study {self.name!r} in {self.where} is about another "
                f"training run: {anew(self.where)}"
            )
        ended = trial.state.is_finished() and _OUTCOME not in trial.user_attrs  # of somebody else's
        return ended or trial.user_attrs.get(_OUTCOME) in (_CUT, _WITHDRAWN)

    def _is_first(self, id_: int, key: str) -> bool:
        """Say whether a trial has its configuration, before all others; withdraw it where not."""
        while True:
            earlier = [each for each in self.seen() if each.id < id_]
            if any(each.has(key) for each in earlier):
                self._void(id_, _WITHDRAWN)
                return False
            if not any(each.is_running and each.key is None for each in earlier):
                return True
            time.sleep(_CHOOSING_S)

    def _end(
        self,
        id_: int,
        state: TrialState,
        values: Sequence[float] | None,
        facts: Mapping[str, Any],
    ) -> bool:
        """Keep what a trial found, and end it: its state comes last, so that all is there by then.

        Returns:
            False where somebody had ended it before.
        """
        try:
            with reaching(self.where):
                self.keep(id_, facts)
                self._storage.set_trial_state_values(id_, state, values)
        except _FINISHED:
            return False
        return True

    def _void(self, id_: int, why: str) -> bool:
        """End a trial that holds no configuration; False where it had ended."""
        return self._end(id_, TrialState.FAIL, None, {_OUTCOME: why})


def _written(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is not known, or nothing."""
    return {name: value for name, value in facts.items() if value not in (None, 0)}
