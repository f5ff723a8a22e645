"""Configurations in an Optuna study that several processes share; the only user of Optuna.

No configuration is run twice. A worker writes a running trial that holds the whole configuration,
and only then reads the study: of two trials with one configuration the earlier one has it, and the
other worker withdraws. Storages give trials their ids in the order in which they become visible
(SQLite and the journal file write one at a time, other databases lock the study's row), and a trial
is written with its configuration in one transaction, so no two workers can both find themselves
first. Optuna's own queue (`enqueue_trial`) promises that for journals, but not for SQLite, which
knows no row locks. Where a sampler proposes, the trial is there before its configuration is:
whoever comes later waits until the earlier ones have chosen, as in Lamport's bakery.

A worker tells that it lives: by its process, which others on the machine can see, and by a counter
that it raises every few seconds. The trial of one that died counts as cut, and its configuration is
run again.

Invariant: what is finished, pruned or failed in the study is never run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from autobatch.errors import AutobatchError, FileError, UsageError
from autobatch.support.wording import for_reader, near, one_line

__all__ = [
    "SAMPLERS",
    "BaseSampler",
    "BaseStorage",
    "FixedTrial",
    "Point",
    "Seen",
    "SweepStudy",
    "Trial",
    "points_at",
    "sampler_named",
    "whole_space",
]

Trial = optuna.Trial
FixedTrial = optuna.trial.FixedTrial

SAMPLERS: Mapping[str, Callable[[int | None], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed),
}
"""Samplers of Optuna by name, for two objectives; its own default is TPE."""

_METRICS = ["seconds of a window", "bytes reserved"]

_BEAT_S = 5.0
"""Seconds between two signs of life of a worker."""

_GRACE_S = 60.0
"""Seconds without one after which a worker on another machine counts as dead."""

_LOCK_S = 60.0
"""Seconds that a worker waits while others write to a SQLite file."""

_OPENINGS, _OPENING_S = 20, 0.25
_HALF_MADE = ("already exists", "no such table", "UNIQUE constraint", "database is locked")
"""What SQLite says where another process is just making the same tables."""

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
class Point:
    """One configuration of a space.

    Attributes:
        params: value by name.
        distributions: what each was chosen from.
    """

    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]

    @property
    def key(self) -> str:
        """The same text for the same configuration."""
        return json.dumps(self.params, sort_keys=True, default=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A trial as the study holds it.

    Attributes:
        id: of the storage; trials that came later have larger ones.
        number: in the study.
        key: of its configuration; None where it has none yet.
        params: the configuration.
        is_running: whether a worker that lives is at it.
        is_done: whether its configuration needs no run any more.
        facts: what was kept with it.
        values: seconds and bytes, where it finished.
    """

    id: int
    number: int
    key: str | None
    params: Mapping[str, Any]
    is_running: bool
    is_done: bool
    facts: Mapping[str, Any]
    values: tuple[float, float] | None


@dataclass(slots=True)
class SweepStudy:
    """A study of Optuna with two objectives, seconds and bytes, both to be small."""

    name: str
    where: str | None
    _study: optuna.Study
    _storage: BaseStorage
    _study_id: int
    _digest: str
    _beats: dict[int, tuple[int, float]] = field(default_factory=dict)
    _me: dict[str, Any] = field(default_factory=lambda: _worker(os.getpid()))

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
        where = None if storage is None else _named(storage)
        asked = json.loads(json.dumps(question))
        with _quiet(), _opening(where):
            opened = _storage_of(storage)
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
            raise UsageError(f"the study {name!r} in {where} is none of a sweep: {_anew(where)}")
        if known != asked:
            raise UsageError(
                f"the study {name!r} in {where} is about another training run "
                f"({_differences(known, asked)}): {_anew(where)}"
            )
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        study_id = opened.get_study_id_from_name(name)
        return cls(name, where, study, opened, study_id, digest)

    def seen(self) -> list[Seen]:
        """Return the trials that have or may get a configuration, in their order."""
        with _reaching(self.where):
            trials = self._study.get_trials(deepcopy=False)
        return [self._seen(trial) for trial in trials if not self._is_void(trial)]

    def claim(self, point: Point, facts: Mapping[str, Any]) -> int | None:
        """Begin a trial of a configuration, and return its id; None where another has it.

        Args:
            point: the configuration.
            facts: what to keep with it.
        """
        if any(each.key == point.key and (each.is_running or each.is_done) for each in self.seen()):
            return None
        trial = optuna.create_trial(
            state=TrialState.RUNNING,
            params=dict(point.params),
            distributions=dict(point.distributions),
            user_attrs={
                _WORKER: self._me,
                _QUESTION: self._digest,
                _POINT: point.key,
                **_known(facts),
            },
        )
        with _reaching(self.where):
            id_ = self._storage.create_new_trial(self._study_id, template_trial=trial)
        return id_ if self._is_first(id_, point.key) else None

    def skip(self, points: Iterable[tuple[Point, Mapping[str, Any]]]) -> None:
        """Keep configurations that need no run, with facts that say why, unless they are there.

        Two workers that find so at the same instant may both write it, which costs nothing.
        """
        there = {each.key for each in self.seen() if each.is_running or each.is_done}
        for point, facts in points:
            if point.key in there:
                continue
            there.add(point.key)
            trial = optuna.create_trial(
                state=TrialState.PRUNED,
                params=dict(point.params),
                distributions=dict(point.distributions),
                user_attrs={
                    _QUESTION: self._digest,
                    _POINT: point.key,
                    _OUTCOME: "pruned",
                    **_known(facts),
                },
            )
            with _reaching(self.where):
                self._storage.create_new_trial(self._study_id, template_trial=trial)

    def sample(self, suggest: Callable[[Trial], object]) -> tuple[int | None, Point]:
        """Let the sampler propose a configuration, and begin its trial.

        Args:
            suggest: asks the trial for the value of each parameter.

        Returns:
            The trial's id, or None where another has its configuration; and the configuration.
        """
        with _quiet(), _reaching(self.where):
            trial = self._study.ask()
            id_ = self._id_of(trial.number)
            self.keep(id_, {_WORKER: self._me, _QUESTION: self._digest})
            try:
                suggest(trial)
            except BaseException:
                self._void(id_, _CUT)
                raise
        point = Point(params=trial.params, distributions=trial.distributions)
        self.keep(id_, {_POINT: point.key})
        return (id_ if self._is_first(id_, point.key) else None), point

    @contextlib.contextmanager
    def running(self, id_: int) -> Iterator[None]:
        """Give signs of life while the block runs; where it raises, the trial counts as cut.

        A trial that has ended by then stays what it is.
        """
        over = threading.Event()

        def beat() -> None:
            count = 0
            while not over.wait(_BEAT_S):
                count += 1
                with contextlib.suppress(Exception):  # one sign less
                    self._storage.set_trial_user_attr(id_, _BEAT, count)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            over.set()
            thread.join()
            self._void(id_, _CUT)
            raise
        finally:
            over.set()
            thread.join()

    def finish(self, id_: int, values: tuple[float, float], facts: Mapping[str, Any]) -> bool:
        """End a trial with its seconds and bytes; False where others had taken it for dead."""
        return self._end(id_, TrialState.COMPLETE, values, {_OUTCOME: "finished", **facts})

    def prune(self, id_: int, outcome: str, facts: Mapping[str, Any]) -> bool:
        """End a trial without values: it does not fit, need not run, or failed.

        Samplers of Optuna take it for worse than all that finished; FAIL, which they ignore, is for
        trials that hold no configuration.
        """
        return self._end(id_, TrialState.PRUNED, None, {_OUTCOME: outcome, **facts})

    def release_cut(self) -> int:
        """Count trials of workers that died as cut, and return how many there were."""
        cut = 0
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not self._lives(trial):
                cut += self._void(trial._trial_id, _CUT)
        return cut

    def _seen(self, trial: FrozenTrial) -> Seen:
        attributes = trial.user_attrs
        is_running = trial.state == TrialState.RUNNING
        return Seen(
            id=trial._trial_id,
            number=trial.number,
            key=attributes.get(_POINT),
            params=trial.params,
            is_running=is_running and self._lives(trial),
            is_done=trial.state.is_finished(),
            facts=attributes,
            values=(trial.values[0], trial.values[1]) if trial.values else None,
        )

    def _is_void(self, trial: FrozenTrial) -> bool:
        """Say whether a trial holds no configuration: it was cut, withdrawn, or is another's."""
        asked = trial.user_attrs.get(_QUESTION)
        if asked is not None and asked != self._digest:
            raise UsageError(
                f"trial {trial.number} of the study {self.name!r} in {self.where} is about another "
                f"training run: {_anew(self.where)}"
            )
        ended = trial.state.is_finished() and _OUTCOME not in trial.user_attrs  # of somebody else's
        return ended or trial.user_attrs.get(_OUTCOME) in (_CUT, _WITHDRAWN)

    def _is_first(self, id_: int, key: str) -> bool:
        """Say whether a trial has its configuration, before all others; withdraw it where not."""
        while True:
            earlier = [each for each in self.seen() if each.id < id_]
            if any(each.key == key and (each.is_running or each.is_done) for each in earlier):
                self._void(id_, _WITHDRAWN)
                return False
            if not any(each.is_running and each.key is None for each in earlier):
                return True
            time.sleep(_CHOOSING_S)

    def _lives(self, trial: FrozenTrial) -> bool:
        """Say whether the worker of a running trial does, as far as can be seen from here."""
        worker = trial.user_attrs.get(_WORKER, {})
        machine = worker.get("machine")
        if machine is not None and machine == self._me["machine"]:
            return bool(_started(worker["pid"]) == worker["started"])
        count, now = trial.user_attrs.get(_BEAT, 0), time.monotonic()
        known = self._beats.get(trial._trial_id)
        if known is None or known[0] != count:
            self._beats[trial._trial_id] = known = count, now
        return now - known[1] < _GRACE_S

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
            with _reaching(self.where):
                self.keep(id_, facts)
                self._storage.set_trial_state_values(id_, state, values)
        except _FINISHED:
            return False
        return True

    def _void(self, id_: int, why: str) -> bool:
        """End a trial that holds no configuration; False where it had ended."""
        return self._end(id_, TrialState.FAIL, None, {_OUTCOME: why})

    def keep(self, id_: int, facts: Mapping[str, Any]) -> None:
        """Keep facts with a trial, which are no zeros."""
        for name, value in _known(facts).items():
            self._storage.set_trial_user_attr(id_, name, value)

    def _id_of(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is not known, or nothing: each fact costs a write."""
    return {name: value for name, value in facts.items() if value not in (None, 0)}


def sampler_named(name: str, seed: int | None = None) -> BaseSampler:
    """Return a sampler of Optuna by its name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in SAMPLERS:
        known = ", ".join(["grid", *SAMPLERS])
        raise UsageError(f"there is no sampler {name!r}{near(name, SAMPLERS)}; samplers: {known}")
    with _quiet():
        return SAMPLERS[name](seed)


def whole_space(suggest: Callable[[Trial], object], most: int) -> list[Point] | None:
    """Return every configuration of a space, in its order; None where there are more than `most`.

    Args:
        suggest: asks a trial for the value of each parameter.
        most: configurations to look at.
    """
    with _quiet(optuna.logging.ERROR):  # what is raised is told by who catches it
        study = optuna.create_study(sampler=optuna.samplers.BruteForceSampler(seed=0))
        points: dict[str, Point] = {}

        endless: list[Exception] = []

        def visit(trial: Trial) -> float:
            try:
                suggest(trial)
            except Exception as error:
                # which refuses floats without a step
                if "BruteForceSampler" not in str(error.__cause__ or error):
                    raise
                endless.append(error)
                study.stop()
            point = Point(params=trial.params, distributions=trial.distributions)
            points[point.key] = point
            return 0.0

        study.optimize(visit, n_trials=most + 1)
    if endless or len(points) > most:
        return None
    return sorted(points.values(), key=_place)


def points_at(suggest: Callable[[Any], object], values: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Return configurations whose values are known.

    Args:
        suggest: asks a trial for the value of each parameter.
        values: of each configuration, by parameter.
    """
    points = []
    for each in values:
        trial = FixedTrial(dict(each))
        suggest(trial)
        points.append(Point(params=trial.params, distributions=trial.distributions))
    return points


def _place(point: Point) -> list[float]:
    """Return where a configuration stands in its space."""
    return [point.distributions[name].to_internal_repr(v) for name, v in point.params.items()]


def _storage_of(storage: str | os.PathLike[str] | BaseStorage | None) -> BaseStorage:
    if storage is None:
        return optuna.storages.InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    text = os.fspath(storage)
    if "://" not in text:
        backend = JournalFileBackend(text)
        return optuna.storages.JournalStorage(backend)
    is_sqlite = text.startswith("sqlite")
    options = {"connect_args": {"timeout": _LOCK_S}} if is_sqlite else {}
    for left in reversed(range(_OPENINGS)):
        try:
            return optuna.storages.RDBStorage(text, engine_kwargs=options)
        except Exception as error:  # noqa: PERF203 — one worker finds what another half made
            if not left or not any(said in _said(error) for said in _HALF_MADE):
                raise
            time.sleep(_OPENING_S)
    raise AssertionError


def _named(storage: str | os.PathLike[str] | BaseStorage) -> str:
    if isinstance(storage, BaseStorage):
        return f"the {type(storage).__name__}"
    if not isinstance(storage, (str, os.PathLike)) or not os.fspath(storage):
        raise UsageError(f"storage is {storage!r}: {_forms()}")
    return repr(os.fspath(storage))


@contextlib.contextmanager
def _opening(where: str | None) -> Iterator[None]:
    """Say of whatever fails in the block that a storage cannot be opened."""
    try:
        yield
    except AutobatchError:
        raise
    except Exception as error:  # SQLAlchemy's, Optuna's, and of files that are no journals
        raise FileError(f"cannot open the storage {where}: {_said(error)}; {_forms()}") from error


@contextlib.contextmanager
def _reaching(where: str | None) -> Iterator[None]:
    """Say of a storage that was open, and fails in the block, that it cannot be reached."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError, OSError) as error:
        raise FileError(
            f"the storage {where} cannot be read or written any more: {_said(error)}; what had "
            "finished is kept, and the same sweep goes on from there"
        ) from error


def _said(error: Exception) -> str:
    """Return what lies behind an error of SQLAlchemy or Optuna, in one line."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return one_line(error).split(" (Background on")[0]


def _forms() -> str:
    return (
        "name one such as sqlite:///sweep.db, or the path of a journal file such as sweep.journal"
    )


def _anew(where: str | None) -> str:
    other = for_reader("study='another name'", "--study NAME")
    storage = for_reader("storage", "--storage")
    return f"begin anew with {other} or another {storage}; nothing in {where} was changed"


def _differences(known: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Say in what two questions differ, with the values where they are short."""
    parts = []
    for name in dict.fromkeys([*known, *asked]):
        was, now = known.get(name), asked.get(name)
        if was != now:
            pair = f"{name}: {was!r} there, {now!r} here"
            parts.append(pair if len(pair) < 80 else name)
    return ", ".join(parts)


def _worker(pid: int) -> dict[str, Any]:
    return {"machine": _machine(), "pid": pid, "started": _started(pid)}


def _machine() -> str | None:
    """Return what names this boot of this machine, and its process ids; None where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """Return when a process began, in ticks of its machine; None where there is no such process."""
    try:
        # proc(5): field 22, after the command in parentheses, which may hold spaces
        after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after[0] in "ZX" else int(after[19])


@contextlib.contextmanager
def _quiet(level: int = optuna.logging.WARNING) -> Iterator[None]:
    """Keep Optuna from saying what it does below a level, and what of it is experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, level))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
