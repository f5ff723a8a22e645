"""Which of the micro-batches that fit is planned: the largest, the fastest, or a balance of both.

On the GPU in the machine, windows of several splits of the target run and are timed; on a simulated
one their time is an estimate. Invariant: a split that is chosen fits, and what it was chosen by is
in the plan.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import SampleError, UsageError
from autobatch.records.evidence import SpeedPoint
from autobatch.records.plan_record import Objective
from autobatch.records.split import Split, split
from autobatch.support.randomness import random_state_kept
from autobatch.support.wording import for_reader
from autobatch.tuning.probe import Probe
from autobatch.tuning.speed import SpeedModel
from autobatch.workload.kept import attributes_kept
from autobatch.workload.sample import BatchDims, rows_of
from autobatch.workload.workload import Workload

__all__ = [
    "TIMED_STEPS",
    "choice",
    "require_objective",
    "samples_per_second",
    "speed_notes",
    "timed",
]

_WITHIN = 0.03
"""A balanced plan is at most this much slower than the fastest."""

_TIMES_STEPS = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16)
"""The splits that are timed have so many times the fewest accumulation steps."""

TIMED_STEPS = 8
"""Micro-batches of a window that is timed; longer ones take as many times as long."""

_LOADING_SECONDS = 3.0
_LOADED_BATCHES = 200
"""A loader is timed for so long, after its first batch, or until so many batches have come."""


def require_objective(objective: object) -> None:
    """Refuse an objective that there is not.

    Raises:
        UsageError: it is none.
    """
    if objective not in get_args(Objective):
        names = ", ".join(map(repr, get_args(Objective)))
        raise UsageError(f"objective is {objective!r}: use one of {names}")


def timed(probe: Probe, target: int, ceiling: int) -> tuple[SpeedPoint, ...]:
    """Return what splits of the target take, the largest micro-batch first.

    Of a workload that cannot accumulate, there is one split.

    Raises:
        UsageError: the card is simulated, and its speed is not known.
    """
    splits = _splits(target, ceiling, probe.workload.world_size)
    if not probe.workload.accumulates:
        splits = splits[:1]
    device = probe.device
    if isinstance(device, VirtualGpu):
        model = SpeedModel.of(probe.workload, device.spec)
        return tuple(_estimated(model, each) for each in splits)
    points = [_measured(probe, each) for each in splits]
    return tuple(point for point in points if point is not None)


def choice(
    objective: Objective, speed: Sequence[SpeedPoint], target: int, loader_rate: float | None
) -> int:
    """Return the micro-batch that an objective asks for.

    Args:
        objective: what is asked for.
        speed: what splits take, of which the first has the largest micro-batch.
        target: effective batch.
        loader_rate: samples a second that the loader gives; a window takes no less time than them.

    >>> point = lambda size, seconds: SpeedPoint(micro_batch=size, accumulation_steps=64 // size,
    ...     window_seconds=seconds, low=seconds, high=seconds, how="estimate")
    >>> speed = [point(64, 1.02), point(32, 1.0), point(16, 1.01), point(8, 1.5)]
    >>> [choice(o, speed, 64, None) for o in ("largest", "fastest", "balanced")]
    [64, 32, 16]
    >>> choice("balanced", speed, 64, loader_rate=40)  # the loader takes 1.6 s
    8
    """
    loading = 0.0 if loader_rate is None else target / loader_rate
    seconds = {point.micro_batch: max(point.window_seconds, loading) for point in speed}
    if objective == "largest":
        return max(seconds)
    best = min(seconds.values())
    if objective == "fastest":
        return max(size for size, taken in seconds.items() if taken == best)
    return min(size for size, taken in seconds.items() if taken <= best * (1 + _WITHIN))


def samples_per_second(loader: Iterable[Any], workload: Workload) -> float:
    """Time a loader of the user's: samples a second, after its first batch.

    Random generators, of the loader and its data too, and attributes of both are as before.

    Raises:
        UsageError: it can be gone through once only, so that timing would use it up.
        SampleError: its batches cannot be counted, or there are fewer than two.
    """
    if isinstance(loader, Iterator):
        raise UsageError(
            "loader can be gone through only once, and timing it would use it up: pass a "
            "DataLoader, or another object that begins anew with each `for`"
        )
    dims: BatchDims = getattr(workload.batch, "batch_dims", None)
    samples, batches, started, ended = 0, 0, 0.0, 0.0
    parts = (loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler")))
    with random_state_kept(), ExitStack() as kept:
        for part in parts:
            kept.enter_context(attributes_kept(part))
        for batch in loader:
            ended = time.perf_counter()
            if batches:
                samples += rows_of(batch, batch_dims=dims).size
            else:
                started = ended  # workers start, and fill their queue, before the first
            batches += 1
            if ended - started > _LOADING_SECONDS or batches > _LOADED_BATCHES:
                break
    if not samples:
        raise SampleError(f"loader gave {batches} batches: it takes at least two to time it")
    return samples / max(ended - started, 1e-9)


def speed_notes(
    speed: Sequence[SpeedPoint], target: int, planned: Split, loader_rate: float | None
) -> Iterator[str]:
    """Yield what the user should know about time, one line each."""
    if not speed or loader_rate is None:
        return
    seconds = {point.micro_batch: point.window_seconds for point in speed}
    needed = target / seconds.get(planned.micro_batch, min(seconds.values()))
    how = "is estimated to train" if speed[0].how == "estimate" else "trains"
    if needed > loader_rate:
        yield (
            f"the loader gives {loader_rate:,.0f} samples/s and the GPU {how} {needed:,.0f}: "
            "loading decides the time, and a larger micro-batch gains nothing; more workers may"
        )


def _splits(target: int, ceiling: int, world_size: int) -> list[Split]:
    """Return splits of the target into micro-batches up to a ceiling, the largest first."""
    samples = -(-target // world_size)
    fewest = -(-samples // ceiling)
    found: dict[int, Split] = {}
    for times in _TIMES_STEPS:
        steps = min(round(fewest * times), samples)
        each = split(target, ceiling=-(-samples // steps), world_size=world_size)
        found.setdefault(each.micro_batch, each)
    return [found[size] for size in sorted(found, reverse=True)]


def _estimated(model: SpeedModel, each: Split) -> SpeedPoint:
    estimate = model.estimate(each.micro_batch, each.accumulation_steps)
    if estimate is None:
        raise UsageError(
            f"the speed of {model.gpu.name} is not known, so that no micro-batch can be called "
            "fast: name a card of the catalogue, or "
            + for_reader("leave objective and loader out", "leave --objective out")
        )
    return _point(each, estimate.seconds, estimate.low, estimate.high, "estimate")


def _measured(probe: Probe, each: Split) -> SpeedPoint | None:
    """Run and time a split; None where it does not fit after all."""
    steps = min(each.accumulation_steps, TIMED_STEPS)
    run = probe.execute(each.micro_batch, steps)
    if not run.fits(probe.budget_bytes) or run.window_seconds is None or run.window_range is None:
        return None
    times = each.accumulation_steps / steps
    low, high = (times * seconds for seconds in run.window_range)
    return _point(each, times * run.window_seconds, low, high, "measured")


def _point(
    each: Split, seconds: float, low: float, high: float, how: Literal["measured", "estimate"]
) -> SpeedPoint:
    return SpeedPoint(
        micro_batch=each.micro_batch,
        accumulation_steps=each.accumulation_steps,
        window_seconds=seconds,
        low=low,
        high=high,
        how=how,
    )
