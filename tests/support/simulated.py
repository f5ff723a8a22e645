"""Runs on a simulated GPU, and what their traces say."""

from __future__ import annotations

import torch
from torch import nn

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import GpuSpec, find_gpu
from autobatch.gpus.roofline import SpeedEstimate, estimate
from autobatch.memory.trace import Allocation, Trace
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload

WIDTH = 64


def mlp(depth: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, WIDTH)]
    return nn.Sequential(*layers)


def run(
    model: nn.Module, *, gpu: str = "a100-40gb", steps: int = 1, n: int = 8, **options
) -> Trace:
    sample = options.pop("sample", torch.zeros(2, WIDTH))
    workload = Workload(model=model, batch=batch_builder(sample), **options)
    device = VirtualGpu(find_gpu(gpu))
    return device.run(workload, micro_batch=n, accumulation_steps=steps).trace


def window_estimate(
    workload: Workload, gpu: GpuSpec, *, micro_batch: int, accumulation_steps: int
) -> SpeedEstimate | None:
    """Estimate the time of a window from a run of that very window, or of two micro-batches."""
    counted = VirtualGpu(gpu, counts_work=True).run(
        workload, micro_batch=micro_batch, accumulation_steps=min(accumulation_steps, 2)
    )
    assert counted.work is not None
    return estimate(
        counted.work,
        gpu,
        accumulation_steps=accumulation_steps,
        world_size=workload.world_size,
    )


def ops(trace: Trace) -> set[str]:
    return {block.op for block in trace.blocks}


def nbytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def largest(trace: Trace, category: str) -> int:
    """Most bytes of a category alive at once."""
    live = most = 0
    for event in trace.events:
        block = trace.blocks[event if event >= 0 else ~event]
        if block.category == category:
            live += block.size_bytes if event >= 0 else -block.size_bytes
            most = max(most, live)
    return most


NARROW, SAMPLES = 16, 4
NARROW_BYTES = NARROW * SAMPLES * 4


def blocks(model: nn.Module, phase: str) -> list[Allocation]:
    workload = Workload(
        model=model,
        batch=batch_builder(torch.zeros(2, NARROW)),
        loss=lambda model, batch: model(batch).sum(),
        optimizer=torch.optim.SGD,
    )
    device = VirtualGpu(find_gpu("a100-40gb"))
    trace = device.run(workload, micro_batch=SAMPLES, accumulation_steps=1).trace
    marks = [mark.event for mark in trace.marks if mark.window == 0 and mark.phase == phase]
    ends = [mark.event for mark in trace.marks if mark.event > marks[0]]
    made = trace.events[marks[0] : ends[0]]
    return [trace.blocks[event] for event in made if event >= 0]


def made_by(model: nn.Module, op: str, phase: str = "backward") -> list[int]:
    return [block.size_bytes for block in blocks(model, phase) if op in block.op]
