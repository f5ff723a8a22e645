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
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from torch import nn

from autobatch import _version
from autobatch.choosing.bench import bench_of
from autobatch.choosing.space import Configuration, OwnLever, Space
from autobatch.choosing.swept import Sweep
from autobatch.choosing.values import shown
from autobatch.devices.base import Device
from autobatch.devices.choose import Gpu, choose_device
from autobatch.devices.preserve import answering
from autobatch.errors import AutobatchError, DoesNotFitError, UsageError, WorkloadError
from autobatch.levers.lever import Lever
from autobatch.levers.setup import Setup
from autobatch.records.codec import dump_json
from autobatch.records.progress import Progress, ProgressCallback, silent
from autobatch.records.sweep import SweepTrial, front_of
from autobatch.support.installing import install_line
from autobatch.support.units import format_bytes
from autobatch.support.wording import count
from autobatch.tuning.planning import host_samples, probe_of
from autobatch.tuning.question import question_of
from autobatch.tuning.streams import with_heaviest_batch
from autobatch.tuning.workloads import checked_target, workload_of
from autobatch.workload.complete import Asked, WorkloadOptions, require_options
from autobatch.workload.identity import CODE, identity_of
from autobatch.workload.workload import Workload

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from autobatch.choosing.points import Points
    from autobatch.choosing.samplers import BaseSampler, Point
    from autobatch.choosing.storages import BaseStorage
    from autobatch.choosing.sweeping import Worker

__all__ = ["sweep"]

_WHOLE = 300
"""Spaces of at most so many configurations are gone through whole."""

_GRID = 2**20
"""The same where all of a space is asked for; one of more is taken for endless."""

_LATEST_S = 1e12
"""Seconds of a timeout that is taken for none by mistake."""

_WITH_CODE = ("loss", "optimizer", "window", "evaluate", "batch", "stream", "sharding", "changes")
"""What of a Workload is, or holds, code of the user's own, beside its model."""

_TRIALS = 100
"""So many configurations of a larger space run, if no other number is given."""


@answering()
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
    target = checked_target(target, asked.world_size, headroom)
    _require_numbers(trials, timeout, seed)
    _require_optuna()
    from autobatch.choosing.points import Points
    from autobatch.choosing.study import SweepStudy
    from autobatch.choosing.sweeping import Worker

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
    points = Points(space)
    every, proposing = _gone_through(points, sampler, seed)
    worker = Worker(
        points=points,
        every=every,
        bench=bench,
        study=SweepStudy.open(storage, study, _plain(question, workload, space), sampler=proposing),
        sampler=proposing,
        most=trials if proposing is None else trials or _TRIALS,
        until=None if timeout is None else started + timeout,
        progress=progress,
    )
    worker.go()
    return _answer(worker, setup, target, started)


def _gone_through(
    points: Points, sampler: str | BaseSampler | None, seed: int | None
) -> tuple[list[Point] | None, BaseSampler | None]:
    """Decide how a space is gone through: whole, or as a sampler proposes.

    Returns:
        The whole space, if it could be listed; and the sampler, or None where it is gone through
        whole.

    Raises:
        UsageError: there is no such sampler, or the space has no end.
    """
    from autobatch.choosing.samplers import sampler_named

    if sampler in (None, "grid"):
        every = points.whole(_WHOLE if sampler is None else _GRID)
        if every is not None:
            return every, None
        if sampler == "grid":
            raise UsageError(
                "the space has no end, as levers of your own ask for numbers without a step: "
                "pass step=, or another sampler"
            )
    proposing = sampler_named("tpe" if sampler is None else sampler, seed)
    return points.counted(), proposing


def _answer(worker: Worker, setup: Setup, target: int, started: float) -> Sweep:
    """Put together what the study holds, and plan the best.

    Raises:
        WorkloadError: everything failed.
        DoesNotFitError: nothing that was tried fits.
    """
    held, budget = worker.look(), worker.bench.budget_bytes
    # what a sampler put together and is no configuration is none of those that there are
    had = (t for t in held.trials.values() if t.outcome != "cannot be had" or t.executions)
    trials = tuple(sorted(had, key=lambda trial: trial.number))
    left = sum(each.key not in held.trials for each in worker.every or ())
    if not held.finished:
        raise _nothing(trials, left, budget)
    finished = (worker.points.of(held.params[t.number]) for t in trials if t.outcome == "finished")
    options = [o for each in finished if isinstance(each, Configuration) for o in each.options]
    best = worker.points.at(held.params[front_of(trials)[0].number])
    done, _ = worker.progressed(held)
    worker.progress(Progress(step="planning the fastest", executions=done, expected=done + 1))
    return Sweep(
        model=type(setup.workload.model).__name__,
        gpu=setup.gpu.name,
        target=target,
        world_size=setup.workload.world_size,
        budget_bytes=budget,
        memory=worker.bench.memory,
        time=worker.bench.time,
        trials=trials,
        configurations=None if worker.every is None else len(worker.every),
        left=left,
        sampler="whole space" if worker.sampler is None else type(worker.sampler).__name__,
        study=worker.study.name,
        storage=worker.study.where,
        code={option.label: option.code for option in options},
        warnings=tuple(dict.fromkeys(worker.warnings)),
        notes=tuple(dict.fromkeys((*setup.workload.notes, *worker.notes))),
        plan=worker.bench.plan(best),
        seconds=time.perf_counter() - started,  # with those of planning
    )


def _nothing(trials: Sequence[SweepTrial], left: int, budget_bytes: int) -> AutobatchError:
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
            f"at micro-batch {least.micro_batch:,}, needs "
            f"{format_bytes(least.reserved_bytes or 0)} of "
            f"{format_bytes(budget_bytes)}; {advice}"
        )
    failed = [trial for trial in trials if trial.outcome == "failed"]
    if failed:
        return WorkloadError(
            f"{count(len(failed), 'configuration')} ran and failed: {failed[0].label} at "
            f"micro-batch {failed[0].micro_batch}: {failed[0].reason}"
        )
    return UsageError("nothing was tried: allow more time or more trials")


def _plain(question: Mapping[str, object], workload: Workload, space: Space) -> dict[str, Any]:
    """Return what a study is about, in plain values: not how the script was called.

    The question compares values; the code of the model and of what trains it is added here.
    """
    plain = json.loads(dump_json({k: v for k, v in question.items() if k != "arguments"}))
    plain["gpu"] = plain["gpu"]["name"], plain["gpu"]["capacity_bytes"]
    kinds = {
        f"{kind.__module__}.{kind.__qualname__}": kind
        for kind in map(type, workload.model.modules())
    }
    parts = identity_of({**kinds, **{each: getattr(workload, each) for each in _WITH_CODE}})
    code = {name: part for name, part in parts.items() if name.endswith(CODE)}
    return {**plain, "code": code, "autobatch": _version.__version__, **space.described}


def _limit(workload: Workload, device: Device) -> int | None:
    """Return the largest micro-batch that the data and the memory of the host allow."""
    limits = workload.sample_limit, host_samples(workload, device)
    return min((limit for limit in limits if limit is not None), default=None)


def _require_numbers(trials: Any, timeout: Any, seed: Any) -> None:
    """Refuse numbers that are none.

    Raises:
        UsageError: one of them is.
    """
    if trials is not None and not (_is_number(trials, Integral) and trials > 0):
        raise UsageError(f"trials is {shown(trials)}: give a number above 0, a whole one")
    if timeout is not None and not (_is_number(timeout, Real) and 0 < timeout < _LATEST_S):
        raise UsageError(f"timeout is {shown(timeout)}: give a number above 0, in seconds")
    if seed is not None and not (_is_number(seed, Integral) and 0 <= seed < 2**32):
        raise UsageError(f"seed is {shown(seed)}: give a whole number from 0 to 2**32 - 1")


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _require_optuna() -> None:
    try:
        from autobatch.choosing import study  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed: {install_line('sweep')}") from error
