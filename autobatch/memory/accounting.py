"""Turns traces into what users read: footprints, timelines and the memory curve.

Invariant: a footprint's categories and rounding sum to the allocator's peak; a timeline keeps the
highest instant of every stretch that it stands for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from autobatch.gpus.catalogue import GpuSpec
from autobatch.gpus.uncertainty import kind_of, peak_range
from autobatch.memory.allocator import CachingAllocator
from autobatch.memory.attribution import category_name
from autobatch.memory.replay import Replay, simulate
from autobatch.memory.trace import Category, Trace
from autobatch.records.evidence import MemoryPoint, Timeline, TimelineSegment, WindowMemory
from autobatch.records.footprint import Evidence, Footprint

__all__ = [
    "activity_bytes",
    "curve_sizes",
    "footprint_of",
    "memory_point",
    "replay",
    "timeline_of",
    "whole_window",
]

_SAMPLES = 400
_CURVE_POINTS = 7


def replay(
    trace: Trace, allocator: CachingAllocator | None = None, *, timeline: bool = False
) -> Replay:
    """Run a trace through an allocator without a limit, as `simulate` does.

    A run fits into a budget without a retry exactly if its peak without a limit does, because the
    limit only matters to requests that would exceed it.
    """
    return simulate(
        trace.sizes, trace.events, allocator=allocator, streams=trace.streams, timeline=timeline
    )


def footprint_of(
    trace: Trace,
    replayed: Replay,
    gpu: GpuSpec,
    evidence: Evidence,
    *,
    simulated: bool,
    held_bytes: int = 0,
    world_size: int = 1,
) -> Footprint:
    """Account for every byte allocated at the peak of a trace.

    Args:
        trace: of training windows, executed or predicted.
        replayed: the trace in the allocator.
        gpu: where the windows run.
        evidence: how the trace is known.
        simulated: whether it comes from a GPU that is not in the machine.
        held_bytes: allocated before the trace began, by the user's own tensors.
        world_size: GPUs that train together.
    """
    kind = kind_of(block.op for block in trace.blocks) if simulated else None
    totals = trace.by_category(replayed.peak_event)
    low, high = (
        (None, None)
        if kind is None
        else peak_range(
            replayed.peak_reserved_bytes, gpu.context_bytes, kind, world_size=world_size
        )
    )
    return Footprint(
        micro_batch=trace.micro_batch,
        accumulation_steps=trace.accumulation_steps,
        gpu=gpu.name,
        evidence=evidence,
        parameters_bytes=totals["parameters"],
        buffers_bytes=totals["buffers"],
        gradients_bytes=totals["gradients"],
        optimizer_bytes=totals["optimizer_state"],
        activations_bytes=totals["activations"],
        temporaries_bytes=totals["temporaries"],
        inputs_bytes=totals["inputs"],
        workspace_bytes=totals["workspace"],
        other_bytes=totals["other"] + held_bytes,
        rounding_bytes=replayed.peak_allocated_bytes - sum(totals.values()) - held_bytes,
        peak_allocated_bytes=replayed.peak_allocated_bytes,
        peak_reserved_bytes=replayed.peak_reserved_bytes,
        context_bytes=gpu.context_bytes,
        low_device_bytes=low,
        high_device_bytes=high,
        kind=kind,
    )


def whole_window(
    trace: Trace, evidence: Evidence, allocator: CachingAllocator | None = None
) -> WindowMemory:
    """Account for windows of a single micro-batch, from a trace of windows that have several.

    The first micro-batch of a window and the optimizer step take the same memory with and without
    further micro-batches: gradients are None before the first one, and the batch and output that
    are alive during the step are as large whichever micro-batch was the last. The peak is therefore
    the highest instant outside of later micro-batches.

    Args:
        trace: of two windows at the samples of a whole update.
        evidence: how the trace is known.
        allocator: the state of the device before the trace; empty if None.
    """
    held_bytes = allocator.allocated_bytes if allocator else 0
    replayed = replay(trace, allocator, timeline=True)
    spans = zip(trace.marks, (*(m.event for m in trace.marks[1:]), len(trace.events)), strict=True)
    instants = (
        event
        for mark, end in spans
        if mark.micro_batch == 0 or mark.phase in ("step", "evaluate")
        for event in range(mark.event, end)
    )
    peak = max(instants, key=replayed.allocated_bytes.__getitem__)
    allocated = replayed.allocated_bytes[peak]
    totals = {category_name(c): size for c, size in trace.by_category(peak).items()}
    totals["other"] += held_bytes
    return WindowMemory(
        micro_batch=trace.micro_batch,
        accumulation_steps=1,
        categories=totals | {"rounding": allocated - sum(totals.values())},
        peak_allocated_bytes=allocated,
        evidence=evidence,
    )


def activity_bytes(trace: Trace) -> int:
    """Return a number that grows with what a step needs beside its state.

    It is the most bytes of activations and temporaries held at once, and those held when backward
    passes begin: at small sizes gradients may hide the one, kernels the other.
    """
    begins = {mark.event for mark in trace.marks if mark.phase == "backward"}
    held = most = saved = 0
    for event, index in enumerate(trace.events):
        if event in begins:
            saved = max(saved, held)
        block = trace.blocks[index if index >= 0 else ~index]
        if block.category in ("activations", "temporaries"):
            held += block.size_bytes if index >= 0 else -block.size_bytes
            most = max(most, held)
    return most + saved


def memory_point(micro_batch: int, replayed: Replay, evidence: Evidence) -> MemoryPoint:
    """Return the peaks at a micro-batch as a point of the curve."""
    return MemoryPoint(
        micro_batch=micro_batch,
        peak_allocated_bytes=replayed.peak_allocated_bytes,
        peak_reserved_bytes=replayed.peak_reserved_bytes,
        evidence=evidence,
    )


def curve_sizes(ceiling: int, known: Collection[int] = ()) -> list[int]:
    """Return evenly spaced micro-batches from 1 to beyond the ceiling, none close to known ones."""
    last = ceiling + max(1, ceiling // 8)
    step = last / (_CURVE_POINTS - 1)
    sizes = sorted({max(1, round(step * i)) for i in range(_CURVE_POINTS)})
    return [size for size in sizes if all(abs(size - other) > step / 2 for other in known)]


def timeline_of(trace: Trace, allocator: CachingAllocator | None = None) -> Timeline:
    """Thin the traced windows to a few hundred instants for drawing."""
    replayed = replay(trace, allocator, timeline=True)
    kept = set(_highest_of_each_stretch(replayed.allocated_bytes)) | {replayed.peak_event}
    live: dict[Category, int] = {block.category: 0 for block in trace.blocks}
    samples = []
    for event, index in enumerate(trace.events):
        block = trace.blocks[index if index >= 0 else ~index]
        live[block.category] += block.size_bytes if index >= 0 else -block.size_bytes
        if event in kept:
            samples.append(
                TimelineSegment(
                    event=event,
                    categories={category_name(c): n for c, n in live.items()},
                    allocated_bytes=replayed.allocated_bytes[event],
                    reserved_bytes=replayed.reserved_bytes[event],
                )
            )
    return Timeline(
        samples=tuple(samples),
        marks=tuple((m.event, m.phase, m.window, m.micro_batch) for m in trace.marks),
        peak_event=replayed.peak_event,
    )


def _highest_of_each_stretch(values: tuple[int, ...]) -> Iterable[int]:
    length = max(1, -(-len(values) // _SAMPLES))
    for start in range(0, len(values), length):
        yield max(range(start, min(start + length, len(values))), key=values.__getitem__)
