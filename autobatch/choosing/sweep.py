"""`sweep`: the fastest configuration of a training run, and the front of speed against memory.

A space of a few hundred configurations is gone through whole; of a larger one, a sampler of Optuna
proposes which to look at, and once it has nothing new to propose, those come that are most like the
fastest so far. What the trials so far show to be too large, or slower and larger than another one,
is pruned without a run (`known.py`).

Invariant: the user's model, optimizer and random state are as before; no configuration is run twice
in one study, whoever works at it, and whatever was killed.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from autobatch import _version
from autobatch.choosing.bench import Bench, Tried, bench_of
from autobatch.choosing.known import Known
from autobatch.choosing.space import AS_IT_IS, MICRO_BATCH, Configuration, OwnLever, Space
from autobatch.choosing.untried import by_distance
from autobatch.devices.base import Device
from autobatch.devices.choose import Gpu, choose_device
from autobatch.devices.copies import batch_of
from autobatch.errors import (
    AutobatchError,
    DoesNotFitError,
    LeverError,
    UsageError,
    WorkloadError,
)
from autobatch.levers.lever import Lever, WrongLeverError
from autobatch.levers.setup import Setup
from autobatch.plan.plan import Plan
from autobatch.records.codec import dump_json, encode
from autobatch.records.plan_json import SCHEMA_VERSION
from autobatch.records.progress import Progress, ProgressCallback, silent
from autobatch.records.split import split
from autobatch.records.sweep import Outcome, SweepRecord, SweepTrial
from autobatch.support.files import write_text
from autobatch.support.installing import install_line
from autobatch.support.interrupts import arriving
from autobatch.support.randomness import random_state_kept
from autobatch.support.units import format_bytes
from autobatch.support.wording import count, one_line
from autobatch.tuning.planning import LARGEST, probe_of
from autobatch.tuning.question import question_of
from autobatch.tuning.streams import with_heaviest_batch
from autobatch.tuning.workloads import require_share, whole, workload_of
from autobatch.workload.complete import Asked, WorkloadOptions, require_options
from autobatch.workload.tree import tensors
from autobatch.workload.workload import Workload

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Unpack

    from autobatch.choosing.study import BaseSampler, BaseStorage, Point, Seen, SweepStudy

__all__ = ["Sweep", "sweep"]

_WHOLE = 300
"""Spaces of at most so many configurations are gone through whole."""

_TRIALS = 100
"""So many configurations of a larger space run, if no other number is given."""

_REPEATS = 30
"""After so many proposals in a row that need no run, a sampler has nothing new to propose."""

_COUNTED = 2_000
"""Spaces of more configurations are not counted: each has to be put together for that."""

_AT_ONCE = 8
"""So many combinations of settings are gone through before the fastest so far is asked for."""

_WAIT_S = 0.2
"""Seconds between two looks at what other workers still run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep(SweepRecord):
    """What a sweep found, and the plan of the best; the fields are those of `SweepRecord`.

    Attributes:
        plan: of the fastest configuration, whose levers are to be applied as `code` says.
    """

    plan: Plan

    def to_json(self) -> str:
        """Render all trials, the front and the plan as JSON text."""
        record = {
            each.name: encode(getattr(self, each.name))
            for each in fields(self)
            if each.name != "plan"
        }
        header = {
            "schema_version": SCHEMA_VERSION,
            "autobatch": _version.__version__,
            "best": encode(self.best),
            "front": [trial.number for trial in self.front],
            "executions": self.executions,
        }
        return dump_json(header | record | {"plan": json.loads(self.plan.to_json())})

    def to_frame(self) -> pd.DataFrame:
        """Return the trials as a data frame: a row each, with a column for each lever."""
        from autobatch.report.table import sweep_trials

        return sweep_trials(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_json` into a file, whole or not at all, and return the path.

        Raises:
            FileError: the file cannot be written.
        """
        return write_text(path, self.to_json())

    def report(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.html, report.md, sweep.json, plan.json, trials.csv and the chart.

        Returns:
            The path of report.html.

        Raises:
            FileError: the folder cannot be written.
        """
        from autobatch.report.sweep import write_sweep

        return write_sweep(
            self, folder, {"sweep.json": self.to_json(), "plan.json": self.plan.to_json()}
        )

    def __repr__(self) -> str:
        """Name the answer; `print(sweep)` shows the whole."""
        return (
            f"<Sweep of {self.model} on {self.gpu}: {len(self.trials)} configurations, fastest "
            f"{self.best.label} at micro-batch {self.best.micro_batch}>"
        )

    def __str__(self) -> str:
        """Render the sweep as plain text, the answer first."""
        from autobatch.report.sweep import sweep_summary
        from autobatch.report.text import render

        return render(sweep_summary(self))


@arriving()
def sweep(
    model: nn.Module | Workload | Callable[[], nn.Module | Workload],
    *,
    target: int,
    gpu: Gpu = None,
    levers: Iterable[str | Lever | OwnLever] | None = None,
    allow_numerics: bool = False,
    headroom: float | None = None,
    trials: int | None = None,
    timeout: float | None = None,
    storage: str | os.PathLike[str] | BaseStorage | None = None,
    study: str = "autobatch",
    sampler: str | BaseSampler | None = None,
    seed: int | None = None,
    progress: ProgressCallback = silent,
    **options: Unpack[WorkloadOptions],
) -> Sweep:
    """Find the fastest configuration of levers and micro-batch, and the front of speed and memory.

    On a simulated card each configuration runs once: its memory is simulated, and its time an
    estimate. On the card in the machine it is simulated first, and measured if it then fits.
    Several processes may work at one study at the same time, and a study that was cut short goes on
    where it was. Needs Optuna, which the extra `sweep` installs.

    Args:
        model: as in `tune`.
        target: effective batch: samples per optimizer update over all GPUs.
        gpu: as in `tune`: a card to simulate, or a device to measure on.
        levers: names from `docs/levers.md`, levers, and functions of your own, each of which takes
            the Optuna trial, asks it for values, and returns a function from a `Setup` to another
            one. None is all levers, with settings that keep the numbers.
        allow_numerics: with all levers, also take settings with which training computes something
            else; levers that are named bring all their settings.
        headroom: share of the usable memory to leave free, as in `tune`.
        trials: configurations that run in the study at most, those of earlier sweeps included. None
            is all of a small space, and 100 of a larger one.
        timeout: seconds after which no more configurations are begun.
        storage: where the study is kept: a URL such as "sqlite:///sweep.db", the path of a journal
            file, or a storage of Optuna; None keeps it in memory, for this call.
        study: its name in the storage.
        sampler: what proposes configurations of a large space: "tpe", "nsga2", "nsga3", "random",
            "qmc" or a sampler of Optuna for two objectives, which then also samples a small one;
            "grid" goes through the whole space, however large. None goes through a small space
            whole, and takes "tpe" for a large one.
        seed: of the sampler; workers at one study need different ones.
        progress: told of each step.
        **options: how the model trains, as `tune` takes it: sample, batch_dims, loss, optimizer,
            autocast, clip_norm, world_size and sharding.

    Raises:
        UsageError: an argument cannot be understood, the storage cannot be opened, the study is
            about another training run, or a lever of your own changes the model in place or returns
            what it must not; the subclass says which.
        WorkloadError: the model, loss or optimizer failed as it is, or a lever of your own before
            it returned a function.
        DoesNotFitError: no configuration that was tried fits.

    >>> found = sweep(nn.Linear(64, 8), target=32, gpu="t4", levers=["precision"], trials=2)
    >>> len(found.trials), found.best.micro_batch <= 32
    (2, True)
    """
    started = time.perf_counter()
    require_options(sweep, options)
    asked = Asked(model=model, **options)
    target = whole(target)
    split(target, ceiling=LARGEST, world_size=asked.world_size)
    if headroom is not None:
        require_share(headroom)
    _require_positive(trials=trials, timeout=timeout)
    _require_optuna()
    device = choose_device(gpu)
    workload = workload_of(asked, gpu)
    bench = bench_of(device, target, headroom)
    probe = probe_of(workload, device, target=target, headroom=headroom)
    workload = with_heaviest_batch(workload, device)
    setup = Setup(workload=workload, gpu=device.spec)
    space = Space(
        setup,
        target,
        levers,
        allow_numerics=allow_numerics,
        keeps_settings=bench.keeps_settings,
        limit=_limit(workload, device),
    )
    question = question_of(probe, target=target, prove=False, with_values=False)
    work = _Work(
        space=space,
        bench=bench,
        study_name=study,
        storage=storage,
        question=_plain(question, space),
        sampler=sampler,
        seed=seed,
        most=trials,
        until=None if timeout is None else started + timeout,
        progress=progress,
    )
    work.open()
    work.go()
    record = work.record(setup, target, time.perf_counter() - started)
    configuration = space.configuration(work.fixed(record.best))
    assert isinstance(configuration, Configuration)
    progress(
        Progress(
            step="planning the fastest", executions=len(record.trials), expected=len(record.trials)
        )
    )
    values = {each.name: getattr(record, each.name) for each in fields(SweepRecord)}
    values["seconds"] = time.perf_counter() - started
    return Sweep(**values, plan=bench.plan(configuration))


@dataclass(slots=True, kw_only=True)
class _Work:
    """One worker at a study.

    Attributes:
        space: what to choose from.
        bench: runs configurations.
        study_name: of the study.
        storage: where it is.
        question: what it is about.
        sampler: by name, or Optuna's; None is the default.
        seed: of a sampler by name.
        most: configurations that run at most, or None for the default.
        until: when no more are begun, by `time.perf_counter`; None for no such time.
        progress: told of each step.
        points: the whole space, where it is gone through or could be counted; else None.
        is_sampled: whether a sampler proposes configurations.
    """

    space: Space
    bench: Bench
    study_name: str
    storage: Any
    question: Mapping[str, Any]
    sampler: Any
    seed: int | None
    most: int | None
    until: float | None
    progress: ProgressCallback
    points: list[Point] | None = None
    is_sampled: bool = False
    study: SweepStudy = field(init=False)
    _warnings: list[str] = field(default_factory=list)
    _notes: list[str] = field(default_factory=list)
    _trials: dict[int, SweepTrial] = field(default_factory=dict)
    _configurations: dict[str, Configuration | str] = field(default_factory=dict)

    def open(self) -> None:
        """Decide whether the space is gone through whole, and open the study.

        Raises:
            UsageError: there is no such sampler, or no such study can be had.
        """
        from autobatch.choosing import study

        sampler = self.sampler
        if sampler in (None, "grid"):
            most = _WHOLE if sampler is None else 2**20
            self.points = study.whole_space(self.space.suggest, most)
            if self.points is None and sampler == "grid":
                raise UsageError(
                    "the space has no end, as levers of your own ask for numbers without a step: "
                    "pass step=, or another sampler"
                )
        self.is_sampled = self.points is None
        if self.points is None:
            self.points = self._counted()
        if self.points is not None:  # combinations that there are not need no trial
            self.points = [each for each in self.points if self._has_configuration(each.params)]
        if not self.is_sampled:
            sampler = None
        elif sampler is None or isinstance(sampler, str):
            sampler = study.sampler_named(sampler or "tpe", self.seed)
        self.sampler = sampler
        self.study = study.SweepStudy.open(
            self.storage, self.study_name, self.question, sampler=sampler
        )

    def go(self) -> None:
        """Run configurations until all are known, or trials or time are up."""
        if not self.is_sampled:
            assert self.points is not None
            self._whole(self.points)
            return
        if (unchanged := self._as_it_is()) is not None:  # what the others are compared with
            self._whole(unchanged, stages=1)
        self._sampled()
        if not self._is_over():
            self._rest()

    def record(self, setup: Setup, target: int, seconds: float) -> SweepRecord:
        """Put together what the study holds.

        Raises:
            WorkloadError: everything failed.
            DoesNotFitError: nothing that was tried fits.
        """
        self._look()
        known = (self._trials[id_] for id_ in sorted(self._trials))
        # what a sampler put together and is no configuration is none of those that there are
        trials = tuple(t for t in known if t.outcome != "cannot be had" or t.executions)
        left = 0
        if self.points is not None:
            keys = {each.key for each in self.study.seen() if each.is_done}
            left = sum(each.key not in keys for each in self.points)
        if not any(trial.outcome == "finished" for trial in trials):
            raise self._nothing(trials, left)
        finished = [trial for trial in trials if trial.outcome == "finished"]
        code: dict[str, str] = {}
        for trial in finished:
            configuration = self._configuration(trial)
            if isinstance(configuration, Configuration):
                code |= {option.label: option.code for option in configuration.options}
        return SweepRecord(
            model=type(setup.workload.model).__name__,
            gpu=setup.gpu.name,
            target=target,
            world_size=setup.workload.world_size,
            budget_bytes=self.bench.budget_bytes,
            memory=self.bench.memory,
            time=self.bench.time,
            trials=trials,
            configurations=None if self.points is None else len(self.points),
            left=left,
            sampler=type(self.sampler).__name__ if self.is_sampled else "whole space",
            study=self.study.name,
            storage=self.study.where,
            code=code,
            seconds=seconds,
            warnings=tuple(dict.fromkeys(self._warnings)),
            notes=tuple(dict.fromkeys((*setup.workload.notes, *self._notes))),
        )

    def fixed(self, trial: SweepTrial) -> Any:
        """Return what answers with the values of a finished trial."""
        from autobatch.choosing.study import FixedTrial

        params = next(each.params for each in self.study.seen() if each.number == trial.number)
        return FixedTrial(dict(params))

    def _whole(self, points: Sequence[Point], stages: int = 3, *, waits: bool = True) -> None:
        """Go through configurations, what matters most first, until none is left.

        Args:
            points: the configurations.
            stages: of `Known.next_size` that are gone through; 1 stops at the largest that fits.
            waits: whether to wait for what other workers run, which may be cut.
        """
        expected = self._most() or len(points)
        while True:
            known = self._look()
            seen = {each.key: each for each in self.study.seen() if each.is_running or each.is_done}
            todo: dict[tuple[tuple[str, str], ...], dict[int, Point]] = {}
            pruned: list[tuple[Point, Mapping[str, Any]]] = []
            for point in points:
                if point.key in seen:
                    continue
                configuration = self._of(point.params)
                assert isinstance(configuration, Configuration)
                reason = known.why_not(configuration.combination, configuration.micro_batch)
                if reason is not None:
                    pruned.append((point, {"reason": reason, **_facts(configuration)}))
                    continue
                sizes = todo.setdefault(configuration.combination, {})
                sizes[configuration.micro_batch] = point
            self.study.skip(pruned)
            busy = {
                self._of(each.params).combination  # type: ignore[union-attr]
                for each in seen.values()
                if each.is_running and each.params and self._has_configuration(each.params)
            }
            chosen = self._next(known, todo, busy, stages)
            if chosen is not None:
                if self._is_over():
                    return
                configuration = self._of(chosen.params)
                assert isinstance(configuration, Configuration)
                id_ = self.study.claim(chosen, _facts(configuration))
                if id_ is not None:
                    self._run(id_, chosen.params, expected)
                continue
            if not waits or not any(each.is_running for each in seen.values()):
                return
            if self._is_over():
                return
            self._tell("waiting for what other workers run", expected)
            time.sleep(_WAIT_S)

    def _next(
        self,
        known: Known,
        todo: Mapping[tuple[tuple[str, str], ...], Mapping[int, Point]],
        busy: set[tuple[tuple[str, str], ...]],
        stages: int,
    ) -> Point | None:
        """Return the configuration to run next."""
        guess = known.guess()
        ranked = []
        for place, (combination, sizes) in enumerate(todo.items()):
            stage, size = known.next_size(combination, sorted(sizes, reverse=True), guess)
            if stage < stages:
                ranked.append((stage, combination in busy, place, sizes[size]))
        return min(ranked, key=lambda each: each[:3])[3] if ranked else None

    def _sampled(self) -> None:
        """Let the sampler propose configurations, until it has nothing new.

        Where what it proposes is known, the next micro-batch of the same combination runs instead.
        """
        repeats = 0
        while repeats < _REPEATS:
            known = self._look()
            if self._is_over():
                break
            repeats += 1
            id_, point = self.study.sample(self._suggest)
            configuration = self._of(point.params)
            reason = (
                configuration
                if isinstance(configuration, str)
                else known.why_not(configuration.combination, configuration.micro_batch)
            )
            if id_ is not None and reason is not None:
                is_one = isinstance(configuration, Configuration)
                outcome: Outcome = "pruned" if is_one else "cannot be had"
                self._end(id_, point.params, outcome, reason=reason)
                id_ = None
            if isinstance(configuration, str):
                continue
            if id_ is None:
                other = self._other_size(known, point)
                if other is None or (id_ := self.study.claim(*other)) is None:
                    continue
                point = other[0]
            else:
                self.study.keep(id_, _facts(configuration))
            self._run(id_, point.params, self._most() or _TRIALS)
            repeats = 0

    def _rest(self) -> None:
        """Go through what the sampler does not propose, the most like the fastest so far first.

        Of each combination the largest micro-batch that fits comes first, and the others once all
        combinations had their turn.
        """
        for stages in (1, 3):
            came: set[str] = set()
            while not self._is_over():
                new = (
                    points
                    for key, points in self._near_the_best()
                    if key not in came and not came.add(key)  # type: ignore[func-returns-value]
                )
                chunk = [point for points in islice(new, _AT_ONCE) for point in points]
                if not chunk:
                    break
                had = [point for point in chunk if self._has_configuration(point.params)]
                self._whole(had, stages, waits=False)
        if self.points is not None:
            self._whole(self.points)  # what other workers were at, and may have been cut
        elif self.space.has_own and not self._is_over():
            self._notes.append(
                f"the sampler proposed nothing new {_REPEATS} times in a row, and the sweep ended: "
                "values of levers of your own cannot be listed"
            )

    def _suggest(self, trial: Any) -> None:
        """Ask a trial for its values, and put its configuration together: an error ends it."""
        self.space.suggest(trial)
        self._of(trial.params)

    def _near_the_best(self) -> Iterator[tuple[str, list[Point]]]:
        """Yield combinations of settings by a key, with all micro-batches of each."""
        self._look()
        finished = [trial for trial in self._trials.values() if trial.outcome == "finished"]
        center = dict.fromkeys(self.space.settings, AS_IT_IS)
        if finished:
            center |= min(finished, key=lambda trial: trial.seconds or 0).settings
        if not self.space.has_own:
            for settings in by_distance(self.space.settings, center):
                yield str(settings), self._sizes_of(settings)
            return
        grouped: dict[str, list[Point]] = {}
        for point in self.points or ():
            grouped.setdefault(str(_settings(point.params)), []).append(point)

        def distance(key: str) -> int:
            settings = _settings(grouped[key][0].params)
            return sum(str(value) != center.get(name) for name, value in settings.items())

        for key in sorted(grouped, key=distance):
            yield key, grouped[key]

    def _other_size(self, known: Known, point: Point) -> tuple[Point, Mapping[str, Any]] | None:
        """Return the micro-batch to run of a combination that was proposed with one that is known.

        With it come the facts of the configuration; None where all of them are known.
        """
        seen = {each.key for each in self.study.seen() if each.is_running or each.is_done}
        open_: dict[int, tuple[Point, Configuration]] = {}
        for size in self.space.sizes:
            other = replace(point, params={**point.params, MICRO_BATCH: size})
            configuration = self._of(other.params)
            if (
                isinstance(configuration, Configuration)
                and other.key not in seen
                and known.why_not(configuration.combination, size) is None
            ):
                open_[size] = other, configuration
        if not open_:
            return None
        combination = next(iter(open_.values()))[1].combination
        _, size = known.next_size(combination, [*open_], known.guess())
        chosen, configuration = open_[size]
        return chosen, _facts(configuration)

    def _run(self, id_: int, params: Mapping[str, Any], expected: int) -> None:
        """Run a configuration whose trial is ours."""
        configuration = self._of(params)
        assert isinstance(configuration, Configuration)
        if configuration.failure is not None:
            self._end(id_, params, "failed", reason=configuration.failure)
            return
        self._tell(_label(configuration), expected, configuration.micro_batch)
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
                is_as_it_is = not configuration.options and not self.space.has_own
                if is_as_it_is and not self._has_finished():
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
            self.space.require_untouched(_label(configuration))

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
            self._warnings.append(
                f"a trial of {dict(params)} was taken for dead and given to another worker while "
                "it ran; its result is not used"
            )

    def _look(self) -> Known:
        """Read what the study holds."""
        self.study.release_cut()
        by_key: dict[str, Seen] = {}
        for each in self.study.seen():
            if each.is_done and each.key is not None:
                # another worker may have run what this one pruned, or pruned it at the same instant
                known = by_key.get(each.key)
                if known is None or known.facts["outcome"] == "pruned":
                    by_key[each.key] = each
        self._trials = {each.id: _trial(each) for each in by_key.values()}
        return Known(self._trials.values(), self.bench.margin)

    def _most(self) -> int | None:
        """Return how many configurations may run; None where all of them may."""
        return self.most or (_TRIALS if self.is_sampled else None)

    def _is_over(self) -> bool:
        """Say whether trials or time are up."""
        most = self._most()
        ran = sum(_has_run(trial) for trial in self._trials.values())
        running = sum(each.is_running for each in self.study.seen()) if most is not None else 0
        is_late = self.until is not None and time.perf_counter() > self.until
        return is_late or (most is not None and ran + running >= most)

    def _counted(self) -> list[Point] | None:
        """Return the whole space, where it is small enough to be counted."""
        from autobatch.choosing import study

        if self.space.has_own:
            return study.whole_space(self.space.suggest, _WHOLE)
        if math.prod(map(len, (*self.space.settings.values(), self.space.sizes))) > _COUNTED:
            return None
        center = dict.fromkeys(self.space.settings, AS_IT_IS)
        return [
            point
            for settings in by_distance(self.space.settings, center)
            for point in self._sizes_of(settings)
        ]

    def _sizes_of(self, settings: Mapping[str, str]) -> list[Point]:
        """Return what a combination of settings is with each micro-batch."""
        from autobatch.choosing import study

        sizes = [{**settings, MICRO_BATCH: size} for size in self.space.sizes]
        return study.points_at(self.space.suggest, sizes)

    def _as_it_is(self) -> list[Point] | None:
        """Return the configurations without any lever; None where levers of the user's own are."""
        from autobatch.choosing import study

        if self.space.has_own:
            return None
        points = study.points_at(self.space.suggest, self.space.as_it_is)
        return [each for each in points if self._has_configuration(each.params)]

    def _of(self, params: Mapping[str, Any]) -> Configuration | str:
        from autobatch.choosing.study import FixedTrial

        key = json.dumps(params, sort_keys=True, default=str)
        if key not in self._configurations:
            self._configurations[key] = self.space.configuration(FixedTrial(dict(params)))
        return self._configurations[key]

    def _has_configuration(self, params: Mapping[str, Any]) -> bool:
        return isinstance(self._of(params), Configuration)

    def _configuration(self, trial: SweepTrial) -> Configuration | str:
        return self.space.configuration(self.fixed(trial))

    def _has_finished(self) -> bool:
        return any(trial.outcome == "finished" for trial in self._trials.values())

    def _nothing(self, trials: Sequence[SweepTrial], left: int) -> AutobatchError:
        """Return why there is no answer."""
        tight = [trial for trial in trials if trial.outcome == "does not fit"]
        if tight:
            least = min(tight, key=lambda trial: trial.reserved_bytes or 0)
            advice = (
                f"{left:,} were not looked at: allow more trials or time"
                if left
                else "try more levers, such as those that change numerics, or a larger GPU"
            )
            return DoesNotFitError(
                f"none of {count(len(trials), 'configuration')} fits: the smallest, {least.label} "
                f"at micro-batch {least.micro_batch}, needs "
                f"{format_bytes(least.reserved_bytes or 0)} of "
                f"{format_bytes(self.bench.budget_bytes)}; {advice}"
            )
        failed = [trial for trial in trials if trial.outcome == "failed"]
        if failed:
            return WorkloadError(
                f"{count(len(failed), 'configuration')} ran and failed: {failed[0].label} at "
                f"micro-batch {failed[0].micro_batch}: {failed[0].reason}"
            )
        return UsageError("nothing was tried: allow more time or more trials")

    def _tell(self, what: str, expected: int, micro_batch: int | None = None) -> None:
        done = len(self._trials)
        self.progress(
            Progress(
                step=what,
                executions=done,
                expected=max(expected, done + 1),
                micro_batch=micro_batch,
            )
        )


def _label(configuration: Configuration) -> str:
    changes = [f"{name}: {v}" for name, v in configuration.settings.items() if v != "as it is"]
    return " + ".join(changes) or "as it is"


def _settings(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name != MICRO_BATCH}


def _has_run(trial: SweepTrial) -> bool:
    """Whether a trial was more than looked at; one that was simulated alone counts, too."""
    return trial.executions > 0 or trial.outcome not in ("pruned", "cannot be had")


def _facts(configuration: Configuration) -> dict[str, Any]:
    """Return what a trial keeps of its configuration, beside its parameters."""
    return {
        "accumulation steps": configuration.split.accumulation_steps,
        "changes numerics": configuration.changes_numerics,
    }


def _trial(seen: Seen) -> SweepTrial:
    """Return a trial of the study as a record."""
    facts, params = seen.facts, dict(seen.params)
    size = params.pop(MICRO_BATCH)
    return SweepTrial(
        number=seen.number,
        settings={name: str(value) for name, value in params.items()},
        micro_batch=size,
        accumulation_steps=facts.get("accumulation steps", 0),
        outcome=facts["outcome"],
        reason=facts.get("reason"),
        seconds=seen.values[0] if seen.values else None,
        reserved_bytes=int(seen.values[1]) if seen.values else facts.get("reserved bytes"),
        executions=facts.get("executions", 0),
        simulations=facts.get("simulations", 0),
        changes_numerics=facts.get("changes numerics", False),
    )


def _plain(question: Mapping[str, object], space: Space) -> dict[str, Any]:
    """Return what a study is about, in plain values: not how the script was called."""
    plain = json.loads(dump_json({k: v for k, v in question.items() if k != "arguments"}))
    plain["gpu"] = plain["gpu"]["name"], plain["gpu"]["capacity_bytes"]
    return {**plain, "autobatch": _version.__version__, **space.described}


def _limit(workload: Workload, device: Device) -> int | None:
    """Return the largest micro-batch that the data and the memory of the host allow."""
    limits = [] if workload.sample_limit is None else [workload.sample_limit]
    host_bytes = device.host_limit_bytes()
    if host_bytes is not None:
        with random_state_kept():
            sample_bytes = sum(each.nbytes for each in tensors(batch_of(workload.batch, 2))) / 2
        limits.append(max(2, int(host_bytes / max(sample_bytes, 1))))
    return min(limits, default=None)


def _require_positive(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not value > 0):
            raise UsageError(f"{name} is {value!r}: give a number above 0")


def _require_optuna() -> None:
    try:
        from autobatch.choosing import study  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed: {install_line('sweep')}") from error
