"""From a probe to a plan: the ceiling, the split, the window that will run, and its account.

Invariant: what a plan says is measured or simulated was executed; what the trace model computed is
called predicted.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from autobatch.devices.base import MOST_STEPS, Device, Run
from autobatch.devices.copies import batch_of
from autobatch.devices.virtual.questions import Question, questions
from autobatch.errors import AutobatchError, DoesNotFitError
from autobatch.memory.accounting import (
    curve_sizes,
    footprint_of,
    memory_point,
    timeline_of,
    whole_window,
)
from autobatch.memory.alignment import Misaligned
from autobatch.memory.attribution import lives_of, most_bytes_of, peak_blocks_of
from autobatch.memory.replay import Replay
from autobatch.memory.trace import Trace
from autobatch.plan.plan import Plan
from autobatch.records.evidence import MemoryPoint, ModelFacts, Timeline, WindowMemory
from autobatch.records.footprint import Evidence, Footprint
from autobatch.records.plan_record import Objective
from autobatch.records.progress import ProgressCallback, silent
from autobatch.records.split import Split, split
from autobatch.support.collection import collection_paused
from autobatch.tuning.ceiling import Ceiling, find_ceiling
from autobatch.tuning.notes import plan_notes, plan_warnings, what_is_missing
from autobatch.tuning.objective import choice, samples_per_second, speed_notes, timed
from autobatch.tuning.probe import Probe
from autobatch.tuning.stamp import created_now, versions
from autobatch.tuning.streams import Stream, with_heaviest_batch
from autobatch.tuning.what_if import what_if
from autobatch.workload.counts import counts_of
from autobatch.workload.layout import dims_as_text
from autobatch.workload.tree import tensors
from autobatch.workload.workload import Workload
from autobatch.workload.wrappers import unwrapped

__all__ = ["LARGEST", "footprint_on", "host_samples", "plan_of", "probe_of"]

LARGEST = 2**16
"""Where a search for the ceiling of a small model stops."""

_RETREAT = 0.9
"""The share of a micro-batch that is tried next where batches of all shapes do not fit."""

_NOT_DRAWN: dict[str, Any] = {
    "curve": (),
    "timeline": Timeline(samples=(), marks=(), peak_event=0),
    "peak_blocks": (),
    "lives": None,
    "most_bytes": None,
    "otherwise": None,
    "what_if": None,
}
"""The fields of a plan that `_drawn` fills, where nobody will look at them."""


def probe_of(
    workload: Workload,
    device: Device,
    *,
    target: int,
    headroom: float | None = None,
    progress: ProgressCallback = silent,
) -> Probe:
    """Return a probe of a workload for an effective batch; nothing runs yet.

    Raises:
        UsageError: the device cannot run such a workload, or the target cannot be split.
    """
    # a Workload may bring its own number of GPUs
    split(target, ceiling=LARGEST, world_size=workload.world_size)
    device.require(workload)
    return Probe(
        device=device,
        workload=workload,
        accumulation_steps=(
            MOST_STEPS if workload.accumulates and target > workload.world_size else 1
        ),
        headroom=device.default_headroom if headroom is None else headroom,
        progress=progress,
    )


def plan_of(
    probe: Probe,
    *,
    target: int,
    prove: bool = False,
    objective: Objective = "largest",
    loader: Iterable[Any] | None = None,
    is_drawn: bool = True,
) -> Plan:
    """Return the plan of a probe, with the seconds that it took.

    Args:
        probe: of the workload on its device.
        target: effective batch: samples per optimizer update over all GPUs.
        prove: also run the size above the ceiling.
        objective: which of the micro-batches that fit is planned.
        loader: what gives training its batches, to be timed.
        is_drawn: whether the plan has what charts show: memory by micro-batch and over time, and
            the same update without accumulation. Of many plans, nobody looks at that, and only
            what decides their ceilings is executed.

    Raises:
        DoesNotFitError: not even micro-batch 1 fits.
        UsageError: the objective is about time, and the speed of the card is not known.
        WorkloadError: the user's model, loss or optimizer failed.
    """
    started = time.perf_counter()
    device = probe.device
    # timed before what the user has on the card waits in host memory
    rate = None if loader is None else samples_per_second(loader, probe.workload)
    # what runs leave is collected by their devices
    with collection_paused(), device.hosting(probe.workload):
        probe.workload = with_heaviest_batch(probe.workload, device)
        plan = _searched(
            target,
            probe,
            prove=prove,
            objective=objective,
            loader_rate=rate,
            is_drawn=is_drawn,
        )
    # what is known only when the user's state is back
    notes = tuple(note for note in device.notes() if note not in plan.warnings)
    seconds = time.perf_counter() - started
    return replace(plan, warnings=(*plan.warnings, *notes), seconds=seconds)


def _searched(
    target: int,
    probe: Probe,
    *,
    prove: bool,
    objective: Objective,
    loader_rate: float | None,
    is_drawn: bool,
) -> Plan:
    """Search for the ceiling, and put the answer of `plan_of` together."""
    device, workload = probe.device, probe.workload
    samples_per_rank = -(-target // workload.world_size)
    limit = _limit(workload, device, samples_per_rank)
    has_one_go = probe.accumulation_steps > 1 and not device.must_run_the_plan
    with questions() as asked:
        found = find_ceiling(
            probe,
            limit,
            samples_per_rank if has_one_go else None,
            prove=prove,
            share=samples_per_rank,
            foresee=partial(_simulated_ceiling, probe, limit, samples_per_rank),
        )
    if not found.micro_batch:
        raise DoesNotFitError(what_is_missing(probe, found))
    if not workload.accumulates:
        if found.micro_batch < samples_per_rank:
            raise DoesNotFitError(
                "an optimizer that steps in the backward pass needs all samples of an update at "
                f"once: {samples_per_rank} are asked for, and {found.micro_batch} fit; use a "
                "smaller target, or let it step after the last micro-batch"
            )
        objective = "largest"
    is_about_time = objective != "largest" or loader_rate is not None
    speed = timed(probe, target, found.micro_batch) if is_about_time else ()
    most = choice(objective, speed, target, loader_rate) if speed else found.micro_batch
    planned, window, footprint, stream = _planned_stream(target, probe, found, most)
    ceiling_footprint = _at(probe, found, found.micro_batch).footprint
    drawn = (
        _drawn(probe, found, planned, window, limit, asked, objective) if is_drawn else _NOT_DRAWN
    )
    run = next(run for run in probe.runs.values() if run.shortage is None)
    return Plan(
        split=planned,
        ceiling=None if found.limit_reached else found.micro_batch,
        ceiling_at_least=found.micro_batch,
        headroom=probe.headroom,
        budget_bytes=probe.budget_bytes,
        others_bytes=device.others_bytes,
        allowed_bytes=device.allowed_bytes,
        gpu=device.spec,
        model=_facts(workload, run),
        footprint=footprint,
        ceiling_footprint=ceiling_footprint,
        trials=tuple(probe.trials),
        sharding=workload.shares,
        levers=workload.levers,
        batch_dims=dims_as_text(getattr(workload.batch, "batch_dims", None)),
        method=found.method,
        warnings=(
            *plan_warnings(probe, run, found, footprint, planned.accumulation_steps),
            *stream,
            *speed_notes(speed, target, planned, loader_rate),
        ),
        notes=tuple(plan_notes(probe, run, found, limit)),
        objective=objective,
        speed=speed,
        loader_samples_per_s=loader_rate,
        versions=versions(),
        created=created_now(),
        seconds=0.0,
        **drawn,
    )


def _limit(workload: Workload, device: Device, samples_per_rank: int) -> int:
    """Return the largest micro-batch to consider."""
    limit = workload.sample_limit or max(LARGEST, samples_per_rank)
    of_host = host_samples(workload, device)
    return limit if of_host is None else min(limit, of_host)


def host_samples(workload: Workload, device: Device) -> int | None:
    """Return how many samples the memory of the host allows at once; None for no limit."""
    host_bytes = device.host_limit_bytes()
    if host_bytes is None:
        return None
    sample_bytes = sum(tensor.nbytes for tensor in tensors(batch_of(workload.batch, 2))) / 2
    return max(2, int(host_bytes / max(sample_bytes, 1)))


def _simulated_ceiling(probe: Probe, limit: int, share: int) -> Ceiling | None:
    """Return what a simulation takes for the ceiling of a card that is here."""
    if probe.device.is_simulated:
        return None
    device = probe.device.simulated()
    simulated = Probe(
        device=device,
        workload=probe.workload,
        accumulation_steps=probe.accumulation_steps,
        headroom=probe.headroom,
        progress=silent,
    )
    try:
        return find_ceiling(simulated, limit, share=share)
    except AutobatchError:  # it only says where to look first
        return None


class _Window(NamedTuple):
    """A window that is executed or predicted, and its account."""

    trace: Trace
    peak_event: int
    footprint: Footprint


def _planned_stream(
    target: int, probe: Probe, found: Ceiling, ceiling: int
) -> tuple[Split, _Window, Footprint, list[str]]:
    """Return what `_planned` does, as batches of all shapes of the data need it, and notes."""
    budget = probe.budget_bytes
    while True:
        planned, window = _planned(target, probe, found, ceiling)
        footprint = window.footprint
        stream = Stream.of(probe.workload, probe.device, footprint)
        if stream is None:
            return planned, window, footprint, []
        if stream.fits(budget) or planned.micro_batch == 1:
            note = stream.note(planned.micro_batch, budget)
            return planned, window, stream.footprint(footprint, budget), [note] if note else []
        ceiling = max(int(_RETREAT * planned.micro_batch), 1)


def _planned(target: int, probe: Probe, found: Ceiling, ceiling: int) -> tuple[Split, _Window]:
    """Return the split, and the window that will run.

    On a real GPU the window that will run is run. Should one not fit below a ceiling that does, the
    next smaller split is tried.
    """
    # what a model tells that is not exact, a simulated card tells as it is
    must_run = probe.device.must_run_the_plan or (found.model and not found.model.is_exact)
    while True:
        planned = split(target, ceiling=ceiling, world_size=probe.workload.world_size)
        steps, size = min(planned.accumulation_steps, MOST_STEPS), planned.micro_batch
        if steps == probe.accumulation_steps and not must_run:
            window = _at(probe, found, size)
            if window.footprint.peak_reserved_bytes <= probe.budget_bytes:
                return planned, window
        else:
            if steps == probe.accumulation_steps:
                run = probe.run(size)
            else:  # without accumulation no gradient waits in memory: a window of its own
                run = found.whole or probe.execute(size, steps)
            if run.fits(probe.budget_bytes):
                return planned, _executed(probe, run)
        ceiling = size - 1
        if not ceiling:
            raise DoesNotFitError(what_is_missing(probe, found))


def footprint_on(
    device: Device,
    workload: Workload,
    trace: Trace,
    replayed: Replay,
    evidence: Evidence | None = None,
) -> Footprint:
    """Account for windows that a device ran, or for some that are known otherwise."""
    return footprint_of(
        trace,
        replayed,
        device.spec,
        evidence or device.evidence,
        simulated=device.is_simulated,
        held_bytes=device.allocator().allocated_bytes,
        world_size=workload.world_size,
    )


def _executed(probe: Probe, run: Run) -> _Window:
    footprint = footprint_on(probe.device, probe.workload, run.trace, run.replay)
    return _Window(run.trace, run.replay.peak_event, footprint)


def _at(probe: Probe, found: Ceiling, size: int) -> _Window:
    """Return the probed window at a size."""
    if size in probe.runs or found.model is None:
        return _executed(probe, probe.run(size))
    try:
        trace = found.model.trace(size)
    except Misaligned:  # the model is not of this size
        return _executed(probe, probe.run(size))
    replayed = found.predicted.get(size) or probe.predict(found.model, size)
    footprint = footprint_on(probe.device, probe.workload, trace, replayed, "predicted")
    return _Window(trace, replayed.peak_event, footprint)


def _drawn(
    probe: Probe,
    found: Ceiling,
    planned: Split,
    window: _Window,
    limit: int,
    asked: Collection[Question],
    objective: Objective,
) -> dict[str, Any]:
    """Return the fields of a plan that its charts and its page show."""
    device, workload = probe.device, probe.workload
    held_bytes = device.allocator().allocated_bytes
    labelled = device.labelled(workload, window.trace)
    curve = _curve(probe, found)
    return {
        "curve": curve,
        "timeline": timeline_of(window.trace, device.allocator()),
        "peak_blocks": peak_blocks_of(labelled, window.peak_event, held_bytes=held_bytes),
        "lives": lives_of(labelled),
        "most_bytes": most_bytes_of(window.trace, held_bytes=held_bytes),
        "otherwise": _otherwise(planned, probe, found),
        "what_if": (
            what_if(probe, found, planned, curve, limit, asked)
            if objective == "largest" and workload.accumulates
            else None
        ),
    }


def _otherwise(planned: Split, probe: Probe, found: Ceiling) -> WindowMemory | None:
    """Account for one GPU's samples of an update at once, or in two halves if that is the plan."""
    samples = max(map(sum, planned.windows))
    if found.model is None or samples == 1:
        return None
    if planned.accumulation_steps == 1:
        halves = _at(probe, found, -(-samples // 2)).footprint
        return WindowMemory(
            micro_batch=halves.micro_batch,
            accumulation_steps=2,
            categories=halves.categories,
            peak_allocated_bytes=halves.peak_allocated_bytes,
            evidence=halves.evidence,
        )
    with suppress(Misaligned):
        trace = found.model.trace(samples)
        return whole_window(trace, "predicted", probe.device.allocator())
    return None


def _curve(probe: Probe, found: Ceiling) -> tuple[MemoryPoint, ...]:
    points = {size: memory_point(size, r, "predicted") for size, r in found.predicted.items()}
    for size, run in probe.runs.items():
        if run.is_free:
            points[size] = memory_point(size, run.replay, probe.device.evidence)
    if found.model is not None:
        for size in curve_sizes(found.micro_batch, known=points):
            with suppress(Misaligned):
                points[size] = memory_point(size, probe.predict(found.model, size), "predicted")
    return tuple(points[size] for size in sorted(points))


def _facts(workload: Workload, run: Run) -> ModelFacts:
    # what ran is not the user's model where levers changed the copy
    counts = run.counts or counts_of(unwrapped(workload.model))
    return ModelFacts(
        name=type(workload.model).__name__,
        parameters=counts.parameters,
        trainable_parameters=counts.trainable_parameters,
        batchnorm_layers=counts.batchnorm_layers,
        optimizer=run.optimizer,
        loss=run.loss,
        loss_code=run.loss_code,
        autocast=workload.autocast,
        clip_norm=workload.clip_norm,
        frozen=counts.frozen,
    )
