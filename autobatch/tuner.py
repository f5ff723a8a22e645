"""`tune` and `predict`: from a model to a plan, or to a footprint.

Invariant: the user's model, optimizer and random state are as before, whatever happens.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from autobatch import _version
from autobatch.accounts import (
    curve_sizes,
    footprint_of,
    memory_point,
    replay,
    timeline_of,
)
from autobatch.ceiling import Ceiling, Probe, find_ceiling
from autobatch.devices.base import Device, Run
from autobatch.devices.virtual import VirtualGpu
from autobatch.errors import DoesNotFitError, NoGpuError, UsageError
from autobatch.footprint import Footprint
from autobatch.gpus import CATALOGUE, GpuSpec, find_gpu
from autobatch.infer import infer
from autobatch.plan import MemoryPoint, ModelFacts, Plan
from autobatch.progress import ProgressCallback, silent
from autobatch.replay import simulate
from autobatch.sample import batch_builder, dataset_length
from autobatch.split import Split, split
from autobatch.trace import Trace
from autobatch.units import format_bytes
from autobatch.workload import Loss, OptimizerSpec, Workload

__all__ = ["predict", "tune"]

_LARGEST = 2**16
"""Where a search for the ceiling of a small model stops."""

_BATCHNORM = (nn.modules.batchnorm._BatchNorm,)


def tune(
    model: nn.Module | Workload,
    *,
    target: int,
    sample: Any = None,
    loss: Loss | None = None,
    optimizer: OptimizerSpec | None = None,
    gpu: str | GpuSpec | None = None,
    world_size: int = 1,
    headroom: float = 0.05,
    autocast: str | None = None,
    clip_norm: float | None = None,
    progress: ProgressCallback = silent,
) -> Plan:
    """Find the micro-batch that fits and the accumulation steps that make the target exactly.

    Args:
        model: the module to train, on any device (`meta` included), or a Workload.
        target: effective batch: samples per optimizer update over all GPUs.
        sample: one batch (any pytree of tensors), a Dataset or a DataLoader; inferred if None.
        loss: `loss(model, batch)` gives a scalar; None takes the output's `.loss`, a scalar
            output, or the sum of the outputs with a warning.
        optimizer: an instance, a class, or a callable on parameters; AdamW if None.
        gpu: a catalogue name, a size such as "24GiB", or a GpuSpec; None is the GPU here.
        world_size: GPUs that share the effective batch.
        headroom: share of the usable memory to leave free, in [0, 1).
        autocast: "bf16", "fp16" or None.
        clip_norm: norm that gradients are clipped to, or None.
        progress: told of each step.

    Raises:
        UsageError: an argument cannot be understood; the subclass says which kind.
        WorkloadError: the model, loss or optimizer failed.
        DoesNotFitError: not even micro-batch 1 fits.
    """
    started = time.perf_counter()
    _require_sensible(headroom)
    split(target, ceiling=_LARGEST, world_size=world_size)  # refuses what cannot be split
    device = _device(gpu)
    workload = _workload(model, sample, loss, optimizer, autocast, clip_norm)
    budget_bytes = int((device.spec.capacity_bytes - device.spec.context_bytes) * (1 - headroom))
    per_rank = -(-target // world_size)
    limit = workload.sample_limit or max(_LARGEST, per_rank)
    probe = Probe(
        device=device,
        workload=workload,
        accumulation_steps=1 if per_rank == 1 else 2,
        budget_bytes=budget_bytes,
        progress=progress,
    )
    found = find_ceiling(probe, limit, per_rank if probe.accumulation_steps > 1 else None)
    if not found.micro_batch:
        raise DoesNotFitError(_what_is_missing(probe, found, device.spec, workload))
    planned = split(target, ceiling=found.micro_batch, world_size=world_size)
    trace, footprint = _planned(probe, found, planned)
    _, ceiling_footprint = _at(probe, found, found.micro_batch)
    run = next(iter(probe.runs.values()))
    return Plan(
        split=planned,
        ceiling=None if found.limit_reached else found.micro_batch,
        ceiling_at_least=found.micro_batch,
        headroom=headroom,
        budget_bytes=budget_bytes,
        gpu=device.spec,
        model=_facts(workload, run),
        footprint=footprint,
        ceiling_footprint=ceiling_footprint,
        trials=tuple(probe.trials),
        curve=_curve(probe, found),
        timeline=timeline_of(trace),
        method=_method(found),
        warnings=tuple(_warnings(workload, run, found, limit)),
        versions={
            "autobatch": _version.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
    )


def predict(
    model: nn.Module | Workload,
    *,
    micro_batch: int,
    accumulation_steps: int = 1,
    sample: Any = None,
    loss: Loss | None = None,
    optimizer: OptimizerSpec | None = None,
    gpu: str | GpuSpec | None = None,
    autocast: str | None = None,
    clip_norm: float | None = None,
    progress: ProgressCallback = silent,
) -> Footprint:
    """Account for the memory of two training windows at one micro-batch, whether or not they fit.

    Takes the arguments of `tune`. From the second micro-batch of a window on all are alike, so
    two of them are executed for any number of accumulation steps above one.

    Raises:
        UsageError: an argument cannot be understood; the subclass says which kind.
        WorkloadError: the model, loss or optimizer failed.
    """
    for name, value in (("micro_batch", micro_batch), ("accumulation_steps", accumulation_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name} is {value!r}: use a whole number of at least 1")
    device = _device(gpu)
    workload = _workload(model, sample, loss, optimizer, autocast, clip_norm)
    probe = Probe(
        device=device,
        workload=workload,
        accumulation_steps=min(accumulation_steps, 2),
        budget_bytes=device.spec.capacity_bytes,
        progress=progress,
    )
    trace = probe.trace(micro_batch)
    footprint = footprint_of(trace, probe.replays[micro_batch], device.spec, device.evidence)
    return replace(footprint, accumulation_steps=accumulation_steps)


def _device(gpu: str | GpuSpec | None) -> Device:
    if isinstance(gpu, GpuSpec):
        return VirtualGpu(gpu)
    if isinstance(gpu, str):
        return VirtualGpu(find_gpu(gpu))
    if gpu is not None:
        raise UsageError(f"gpu is {gpu!r}: use a name such as 'a100-40gb', a size or a GpuSpec")
    if torch.cuda.is_available():
        return VirtualGpu(_card_here())
    raise NoGpuError(
        "there is no CUDA GPU in this machine: name the one to simulate, such as "
        'gpu="a100-40gb" (`autobatch gpus` lists them) or gpu="24GiB"'
    )


def _card_here() -> GpuSpec:
    """Describe the current CUDA device as the catalogue would."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        known = find_gpu(properties.name)
    except UsageError:
        known = find_gpu(f"{properties.total_memory // 2**30}GiB")
    return replace(
        known,
        name=properties.name,
        capacity_bytes=properties.total_memory,
        compute_capability=(properties.major, properties.minor),
    )


def _workload(
    model: nn.Module | Workload,
    sample: Any,
    loss: Loss | None,
    optimizer: OptimizerSpec | None,
    autocast: str | None,
    clip_norm: float | None,
) -> Workload:
    """Complete what the caller gave with what can be inferred; explicit options win."""
    if isinstance(model, Workload):
        workload = model
        if sample is not None:
            workload = replace(workload, batch=batch_builder(sample))
    elif not isinstance(model, nn.Module):
        raise UsageError(
            f"model is a {type(model).__name__}: pass an nn.Module or an autobatch.Workload"
        )
    elif sample is not None:
        workload = Workload(
            model=model, batch=batch_builder(sample), sample_limit=dataset_length(sample)
        )
    else:
        workload = infer(model).workload(model)
    given: dict[str, Any] = {
        "loss": loss,
        "optimizer": optimizer,
        "autocast": autocast,
        "clip_norm": clip_norm,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if loss is not None:
        changes["loss_name"] = "user"
    return replace(workload, **changes)


def _require_sensible(headroom: float) -> None:
    if not isinstance(headroom, (int, float)) or not 0 <= headroom < 1:
        raise UsageError(f"headroom is {headroom!r}: use a share of at least 0 and below 1")


def _planned(probe: Probe, found: Ceiling, planned: Split) -> tuple[Trace, Footprint]:
    """Return the trace of the window that will run, and its account."""
    steps, size = min(planned.accumulation_steps, 2), planned.micro_batch
    if steps == probe.accumulation_steps:
        return _at(probe, found, size)
    if found.whole is not None:
        trace, replayed = found.whole
    else:  # without accumulation no gradient waits in memory, so this is a window of its own
        run, replayed = probe.execute(size, steps)
        trace = run.trace
    return trace, footprint_of(trace, replayed, probe.device.spec, probe.device.evidence)


def _at(probe: Probe, found: Ceiling, size: int) -> tuple[Trace, Footprint]:
    """Return the trace of the probed window at a size, and its account."""
    spec = probe.device.spec
    if size in probe.runs or found.model is None:
        trace = probe.trace(size)
        return trace, footprint_of(trace, probe.replays[size], spec, probe.device.evidence)
    trace = found.model.trace(size)
    replayed = found.predicted.get(size) or replay(trace)
    return trace, footprint_of(trace, replayed, spec, "predicted")


def _curve(probe: Probe, found: Ceiling) -> tuple[MemoryPoint, ...]:
    points = {size: memory_point(size, r, "predicted") for size, r in found.predicted.items()}
    for size, replayed in probe.replays.items():
        points[size] = memory_point(size, replayed, probe.device.evidence)
    if found.model is not None:
        for size in curve_sizes(found.micro_batch, known=points):
            replayed = simulate(found.model.sizes(size), found.model.template.events)
            points[size] = memory_point(size, replayed, "predicted")
    return tuple(points[size] for size in sorted(points))


def _method(found: Ceiling) -> str:
    if found.model is None:
        return "bisection"
    return "trace model (quadratic)" if found.model.degree == 2 else "trace model"


def _facts(workload: Workload, run: Run) -> ModelFacts:
    parameters = list(workload.model.parameters())
    return ModelFacts(
        name=type(workload.model).__name__,
        parameters=sum(p.numel() for p in parameters),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        batchnorm_layers=sum(isinstance(m, _BATCHNORM) for m in workload.model.modules()),
        optimizer=run.optimizer,
        loss=run.loss,
        autocast=workload.autocast,
        clip_norm=workload.clip_norm,
    )


def _warnings(workload: Workload, run: Run, found: Ceiling, limit: int) -> Iterator[str]:
    yield from workload.notes
    yield from run.warnings
    if run.loss == "surrogate sum":
        yield (
            "no loss was given or found in the output: the sum of the outputs stood in for it; "
            "pass loss= for the memory of the real one"
        )
    if found.model is not None and found.model.degree == 2:
        yield (
            "memory grows with the square of the micro-batch, as in-batch contrastive losses do: "
            "with accumulation, each sample is compared with those of its micro-batch only"
        )
    if found.limit_reached:
        yield f"the search stopped at micro-batch {limit}, which fits; the ceiling is higher"
    if found.reason is not None:
        yield f"sizes were executed one by one, because {found.reason}"


def _what_is_missing(probe: Probe, found: Ceiling, spec: GpuSpec, workload: Workload) -> str:
    """Say by how much the smallest size misses the budget, and what would help."""
    smallest = min(probe.replays)
    needed = probe.replays[smallest].peak_reserved_bytes
    short = needed - probe.budget_bytes
    large_enough = sorted(
        (card for card in CATALOGUE.values() if card.capacity_bytes > spec.capacity_bytes
         and (card.capacity_bytes - card.context_bytes) * 0.95 >= needed),
        key=lambda card: card.capacity_bytes,
    )  # fmt: skip
    ideas = [] if workload.autocast else ['autocast="bf16"']
    ideas.append("activation checkpointing")
    ideas.append("an optimizer with less state")
    if large_enough:
        ideas.append(f"a larger GPU ({large_enough[0].name} would do)")
    else:
        ideas.append("sharding over several GPUs")
    return (
        f"not even micro-batch {smallest} fits on {spec.name}: it needs {format_bytes(needed)} "
        f"reserved, the budget is {format_bytes(probe.budget_bytes)}, {format_bytes(short)} "
        f"({short:,} bytes) short; try {', '.join(ideas)}"
        + (f" (a smaller size does not run: {found.reason})" if found.reason else "")
    )
