"""Run a step on the virtual GPU, and read its figure where the script read it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.allocator import CachingAllocator
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.segments import Block
from autobatch.memory.trace import Trace
from reports.accuracy.steps.configuration import Reading, Step
from reports.accuracy.steps.workloads import BUILDERS
from reports.common.journal import Record
from reports.common.results import one_line


def predict_step(record: Mapping[str, Any], keys: Mapping[str, Any]) -> Iterator[Record]:
    """Yield a record for each key (one): what the step takes, or the error that came instead."""
    started = time.perf_counter()
    for key in keys:
        try:
            found: Record = run_step(Step.of_record(record))
        except Exception as error:
            found = {"error": one_line(error)}
        yield {"key": key, **found, "seconds": round(time.perf_counter() - started, 2)}


def run_step(step: Step) -> Record:
    """Execute two windows of a step, and return its allocated and reserved bytes."""
    workload = BUILDERS[step.builder](step)
    run = VirtualGpu(find_gpu(step.gpu)).run(
        workload, micro_batch=step.micro_batch, accumulation_steps=1
    )
    allocated, reserved = read(run.trace, step.reading)
    return {"allocated_bytes": allocated, "reserved_bytes": reserved, "notes": list(run.notes)}


def read(trace: Trace, reading: Reading) -> tuple[int, int]:
    """Return allocated and reserved bytes of a trace where a reading takes them.

    Raises:
        ValueError: the trace has no such window or phase.
    """
    spans = list(_spans(trace, reading))
    if not spans:
        raise ValueError(f"nothing ran in {reading.phases} of window {reading.window}")
    begin, end = (0 if reading.from_start else spans[0][0]), spans[-1][1]
    inside = range(begin, end)
    if reading.phases and not reading.from_start:
        inside = range(*spans[0]) if len(spans) == 1 else range(begin, end)
    allocator = CachingAllocator(AllocatorSettings.parse(reading.allocator))
    live: dict[int, Block] = {}
    sizes, streams = trace.sizes, trace.streams
    allocated = reserved = 0
    window_starts = next(
        (mark.event for mark in trace.marks if mark.window == 1 and mark.phase == "inputs"), -1
    )
    for event, index in enumerate(trace.events[:end]):
        if event == window_starts and reading.empties_cache:
            allocator.empty_cache()
        if index >= 0:
            if sizes[index]:
                live[index] = allocator.malloc(sizes[index], streams[index] if streams else 0)
        elif ~index in live:
            allocator.free(live.pop(~index))
        if event == inside.start and not reading.at_end:
            allocated = max(allocated, allocator.allocated_bytes)
        if event in inside:
            allocated = max(allocated, allocator.allocated_bytes)
            reserved = max(reserved, allocator.reserved_bytes)
    if reading.at_end:
        return allocator.allocated_bytes, allocator.reserved_bytes
    return allocated, reserved


def _spans(trace: Trace, reading: Reading) -> Iterator[tuple[int, int]]:
    ends = [mark.event for mark in trace.marks[1:]] + [len(trace.events)]
    for mark, end in zip(trace.marks, ends, strict=True):
        is_there = reading.window < 0 or (mark.phase != "setup" and mark.window == reading.window)
        if is_there and (not reading.phases or mark.phase in reading.phases):
            yield mark.event, end
