"""Predict the peaks of one model, or its ceiling, on the virtual GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import UnknownGpuError
from autobatch.gpus.catalogue import GpuSpec, find_gpu
from autobatch.memory.alignment import Misaligned
from autobatch.memory.replay import Replay
from autobatch.memory.trace_model import TraceModel
from autobatch.records.progress import silent
from autobatch.tuning.ceiling import find_ceiling
from autobatch.tuning.probe import Probe
from reports.accuracy.models import UnknownModelError, workload_of
from reports.accuracy.tables import Run
from reports.common.journal import Record
from reports.common.results import one_line

SMALL = (2, 3)
"""The executed micro-batches of a model with many rows."""

LARGEST = 1024
"""Where a search stops; the tables' own stop at 512."""


def card_of(run: Run) -> GpuSpec:
    """Return the card of a run: from the catalogue, else one of the table's capacity.

    Raises:
        UnknownGpuError: it is not in the catalogue, and its capacity is unknown.
    """
    try:
        spec = find_gpu(run.gpu)
    except UnknownGpuError:
        if run.capacity_bytes is None:
            raise
        spec = GpuSpec(name=run.gpu, capacity_bytes=run.capacity_bytes)
    if run.ceiling_context_bytes:
        return replace(spec, context_bytes=run.ceiling_context_bytes)
    return spec


def predict(run: Run, keys: Mapping[str, int]) -> Iterator[Record]:
    """Yield a record for each key: what was predicted, or the error that came instead.

    Args:
        run: what is executed.
        keys: micro-batches by the key of their rows.
    """
    started = time.perf_counter()
    left = dict(keys)
    try:
        for key, found in _predicted(run, keys):
            del left[key]
            yield {"key": key, **found, "seconds": round(time.perf_counter() - started, 2)}
    except Exception as error:
        for key in left:
            yield {"key": key, "error": cause_of(error)}


def cause_of(error: Exception) -> str:
    """Say in one line why there is no prediction."""
    return str(error) if isinstance(error, UnknownModelError) else one_line(error)


def _predicted(run: Run, keys: Mapping[str, int]) -> Iterator[tuple[str, Record]]:
    probe = Probe(
        device=VirtualGpu(card_of(run)),
        workload=workload_of(run),
        accumulation_steps=1,
        progress=silent,
    )
    if run.ceiling_context_bytes is not None:
        found = find_ceiling(probe, LARGEST)
        method = "bisection" if found.model is None else "trace model"
        for key in keys:
            yield (
                key,
                {
                    "ceiling": found.micro_batch,
                    "limit_reached": found.limit_reached,
                    "method": method,
                },
            )
        return
    model = _trace_model(probe) if len(set(keys.values())) > len(SMALL) else None
    for key, size in keys.items():
        replay = probe.run(size).replay if model is None else probe.predict(model, size)
        yield key, _peaks(replay) | {"method": "executed" if model is None else "trace model"}


def _trace_model(probe: Probe) -> TraceModel | None:
    """Fit two small executions; None where they do not align and every size has to run."""
    try:
        return TraceModel.fit([probe.run(size).trace for size in SMALL])
    except Misaligned:
        return None


def _peaks(replay: Replay) -> Record:
    return {
        "reserved_bytes": replay.peak_reserved_bytes,
        "allocated_bytes": replay.peak_allocated_bytes,
    }
