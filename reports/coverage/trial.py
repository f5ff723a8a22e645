"""Predict one subject, and note what that took.

Invariant: whatever a model raises ends up in a record; only a crash of the process does not.
"""

from __future__ import annotations

import gc
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import autobatch
from autobatch.devices.base import Run
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import AutobatchError, SampleError, WorkloadError
from autobatch.support.patching import patched
from autobatch.workload.workload import Workload
from reports.common.journal import Record
from reports.common.memory import peak_rss_bytes
from reports.common.results import one_line
from reports.coverage.memory import begin_peak, resident_now_bytes
from reports.coverage.models import Candidate, NotBuiltError, candidates
from reports.coverage.subjects import Subject
from reports.coverage.summary import FAILED, GPU, MICRO_BATCH, NOT_BUILT, PREDICTED

NO_INPUTS = "it asks for sample="
MODEL_FAILS = "its forward or backward pass fails on the simulated GPU"
BAD_LOSS = "its loss cannot be used"
INSIDE = "an error inside autobatch"

_FOLDERS = re.compile(r"(?<=['\" ])/\w[^'\" ]*/(?=[^/'\" ]+)")
"""Where a file lies on this machine, as messages say it."""


def attempt(subject: Subject) -> Record:
    """Return the record of a subject: of its first model that is predicted, else of the last."""
    record: Record = {}
    try:
        for candidate in candidates(subject):
            record = _predicted(candidate)
            if record["outcome"] == PREDICTED:
                break
    except NotBuiltError as error:
        record = {"outcome": NOT_BUILT, "cause": error.cause, "error": str(error)}
    if "error" in record:
        record["error"] = _FOLDERS.sub("", record["error"])
    return {"key": subject.key, "library": subject.library, "name": subject.name, **record}


def _predicted(candidate: Candidate) -> Record:
    model = candidate.model
    record: Record = {
        "micro_batch": MICRO_BATCH,
        "model": type(model).__name__,
        "head": candidate.head,
        "cut": candidate.cut,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    gc.collect()
    scope = begin_peak()
    record["rss_before_bytes"] = resident_now_bytes()
    with _observed() as seen:
        started, cpu_started = time.perf_counter(), time.process_time()
        try:
            footprint = autobatch.predict(model, micro_batch=MICRO_BATCH, gpu=GPU)
        except Exception as error:
            found = {"outcome": FAILED, **_failure(error)}
        else:
            found = {
                "outcome": PREDICTED,
                "allocated_bytes": footprint.peak_allocated_bytes,
                "reserved_bytes": footprint.peak_reserved_bytes,
                "device_bytes": footprint.peak_device_bytes,
            }
        record["seconds"] = round(time.perf_counter() - started, 3)
        record["cpu_seconds"] = round(time.process_time() - cpu_started, 3)
    record["peak_rss_bytes"], record["peak_rss_of"] = peak_rss_bytes(), scope
    record["rss_bytes"] = resident_now_bytes()
    return record | seen | found


@contextmanager
def _observed() -> Iterator[Record]:
    """Note what `predict` sees and does not return: inputs, loss and warnings."""
    seen: Record = {}
    original = VirtualGpu.run

    def run(self: VirtualGpu, workload: Workload, **options: Any) -> Run:
        seen["inputs"] = next(iter(workload.notes), "")
        found = original(self, workload, **options)
        seen["loss"], seen["warnings"] = found.loss, list(found.notes)
        return found

    with patched(VirtualGpu, run=run):
        yield seen


def _failure(error: Exception) -> Record:
    """Return the cause of a failure, its line, and where it was raised."""
    if isinstance(error, SampleError):
        cause = NO_INPUTS
    elif isinstance(error, WorkloadError):
        cause = MODEL_FAILS if error.__cause__ else BAD_LOSS
    else:
        cause = type(error).__name__ if isinstance(error, AutobatchError) else INSIDE
    return {"cause": cause, "error": one_line(error), "frames": _frames(error)}


def _frames(error: BaseException) -> list[str]:
    """Return the innermost calls of the first error in a chain, without folders of this machine."""
    while error.__cause__ is not None:
        error = error.__cause__
    calls = traceback.extract_tb(error.__traceback__)[-6:]
    return [f"{_home(call.filename)}:{call.lineno} {call.name}" for call in calls]


def _home(path: str) -> str:
    for part in ("site-packages/", "/reports/", "/autobatch/"):
        _, found, rest = path.rpartition(part)
        if found:
            return f"{part.strip('/')}/{rest}".removeprefix("site-packages/")
    return path.rpartition("/")[2]
