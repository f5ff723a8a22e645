"""`tune` and `predict`: from a model to a plan, or to a footprint.

Invariant: the user's model, optimizer and random state are as before, whatever happens.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from autobatch import _version
from autobatch.devices.base import Device, Run
from autobatch.devices.cuda.gpu import CudaGpu, describe
from autobatch.devices.cuda.offload import free_host_bytes
from autobatch.devices.cuda.runtime import Card
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import AutobatchError, DoesNotFitError, NoGpuError, UsageError
from autobatch.gpus.catalogue import GpuSpec, find_gpu, is_device
from autobatch.gpus.nvml import driver_version
from autobatch.gpus.uncertainty import MEASURED_HEADROOM, SIMULATED_HEADROOM
from autobatch.memory.accounting import (
    curve_sizes,
    footprint_of,
    memory_point,
    timeline_of,
    whole_window,
)
from autobatch.memory.replay import Replay
from autobatch.memory.trace import Trace
from autobatch.plan.plan import Plan
from autobatch.records.evidence import MemoryPoint, ModelFacts, WindowMemory
from autobatch.records.footprint import Evidence, Footprint
from autobatch.records.progress import ProgressCallback, silent
from autobatch.records.split import Split, split
from autobatch.support.ranks import ranks_here
from autobatch.support.units import GIB, MIB
from autobatch.tuning import cache as plan_cache
from autobatch.tuning.agreement import agreed
from autobatch.tuning.ceiling import Ceiling, Probe, find_ceiling
from autobatch.tuning.isolation import apart
from autobatch.tuning.notes import warnings, what_is_missing
from autobatch.workload.complete import Asked
from autobatch.workload.tree import tensors
from autobatch.workload.workload import Loss, OptimizerSpec, Sharding, Workload

__all__ = ["predict", "tune"]

Gpu = str | GpuSpec | torch.device | None

_LARGEST = 2**16
"""Where a search for the ceiling of a small model stops."""

_NEIGHBOURS_GREW_BYTES = 64 * MIB
_NEIGHBOURS_LEFT_BYTES = GIB
"""A cached plan holds while other processes take no more than then, and not much less."""

_BATCHNORM = (nn.modules.batchnorm._BatchNorm,)


def tune(
    model: nn.Module | Workload,
    *,
    target: int,
    sample: Any = None,
    loss: Loss | None = None,
    optimizer: OptimizerSpec | None = None,
    gpu: Gpu = None,
    world_size: int | None = None,
    sharding: Sharding | None = None,
    headroom: float | None = None,
    autocast: str | None = None,
    clip_norm: float | None = None,
    prove: bool = False,
    isolate: bool = False,
    time_limit: float | None = None,
    cache: bool | Literal["confirm"] = True,
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
        gpu: a catalogue name, a size such as "24GiB", or a GpuSpec, which is simulated; a device
            such as "cuda:1" is measured, and so is the current one if None.
        world_size: GPUs that share the effective batch. None is a Workload's own, or 1; but where
            a process group of several ranks is initialised it is their number: all of them have
            to call `tune`, and get the plan of the one that holds least.
        sharding: "ddp" (None on several GPUs), "fsdp" for PyTorch's FSDP2, or a function that
            applies `fully_shard` to the model; figures are those of rank 0. See `Workload`.
        headroom: share of the usable memory to leave free, in [0, 1); None leaves 0.05 on a GPU
            that is measured, and on a simulated one what `autobatch.gpus.uncertainty` asks for.
        autocast: "bf16", "fp16" or None.
        clip_norm: norm that gradients are clipped to, or None.
        prove: also run the size above the ceiling, and show that it does not fit.
        isolate: probe in a child process, which a fatal CUDA error, a crash or a hang ends in
            place of this one. Everything passed has to be picklable.
        time_limit: seconds that one trial may take before the child is ended; with `isolate`.
        cache: answer from the plans of earlier calls where nothing has changed; "confirm" runs the
            planned window once before.
        progress: told of each step.

    Raises:
        UsageError: an argument cannot be understood; the subclass says which kind.
        WorkloadError: the model, loss or optimizer failed.
        DoesNotFitError: not even micro-batch 1 fits.
        ProbeDiedError: the child process died or took too long.
    """
    if headroom is not None:
        _require_sensible(headroom)
    ranks = ranks_here()
    agrees = world_size is None and ranks > 1
    world_size = ranks if world_size is None else world_size
    split(target, ceiling=_LARGEST, world_size=world_size)  # refuses what cannot be split
    if time_limit is not None and not isolate:
        raise UsageError("time_limit ends a child process: pass isolate=True with it")
    request = _Request(
        target=target,
        world_size=world_size,
        headroom=headroom,
        prove=prove,
        cache=cache,
    )
    parts = (model, sample, loss, optimizer, gpu, autocast, clip_norm, sharding)
    make = partial(_tuned, request, *parts, progress=progress)
    if isolate:
        make = partial(apart, _tuned, request, *parts, progress=progress, time_limit=time_limit)
    return agreed(make) if agrees else make()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What is asked about a workload on a device."""

    target: int
    world_size: int
    headroom: float | None
    prove: bool
    cache: bool | Literal["confirm"]

    @property
    def samples_per_rank(self) -> int:
        return -(-self.target // self.world_size)

    @property
    def accumulation_steps(self) -> int:
        """Of the probed window: from the second micro-batch on all are alike."""
        return 1 if self.samples_per_rank == 1 else 2


def _tuned(
    request: _Request,
    model: nn.Module | Workload,
    sample: Any,
    loss: Loss | None,
    optimizer: OptimizerSpec | None,
    gpu: Gpu,
    autocast: str | None,
    clip_norm: float | None,
    sharding: Sharding | None,
    *,
    progress: ProgressCallback,
) -> Plan:
    started = time.perf_counter()
    device = _device(gpu)
    ranks = request.world_size
    workload = Asked(
        model=model,
        sample=sample,
        loss=loss,
        optimizer=optimizer,
        autocast=autocast,
        clip_norm=clip_norm,
        world_size=ranks,
        sharding=sharding,
    ).workload()
    if workload.world_size != ranks:
        split(request.target, ceiling=_LARGEST, world_size=workload.world_size)
        request = replace(request, world_size=workload.world_size)
    if workload.is_sharded and device.evidence == "measured":
        raise UsageError(
            "sharding is simulated only, not yet run on the GPU in the machine: name the card, "
            'such as gpu="a100-40gb"'
        )
    headroom = request.headroom
    if headroom is None:
        headroom = MEASURED_HEADROOM if device.evidence == "measured" else SIMULATED_HEADROOM
    probe = Probe(
        device=device,
        workload=workload,
        accumulation_steps=request.accumulation_steps,
        headroom=headroom,
        progress=progress,
    )
    key = _key(request, probe) if request.cache else None
    if key is not None and (known := _known(key, request, probe)) is not None:
        return replace(known, seconds=time.perf_counter() - started)
    with device.hosting(workload):
        plan = _probed(request, probe)
    # what is known only when the user's state is back
    remarks = tuple(remark for remark in device.remarks() if remark not in plan.warnings)
    plan = replace(plan, warnings=(*plan.warnings, *remarks), seconds=time.perf_counter() - started)
    if key is not None:
        plan_cache.store(key, plan)
    return plan


def _probed(request: _Request, probe: Probe) -> Plan:
    """Search, and put the answer together."""
    device, workload = probe.device, probe.workload
    limit = _limit(workload, device, request.samples_per_rank)
    is_measured = device.evidence == "measured"
    one_go = request.samples_per_rank if probe.accumulation_steps > 1 else None
    found = find_ceiling(
        probe,
        limit,
        None if is_measured else one_go,
        prove=request.prove,
        guess=partial(_simulated_ceiling, probe, limit) if is_measured else lambda: None,
    )
    if not found.micro_batch:
        raise DoesNotFitError(what_is_missing(probe, found))
    planned, window, footprint = _planned(request, probe, found)
    _, ceiling_footprint = _at(probe, found, found.micro_batch)
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
        curve=_curve(probe, found),
        timeline=timeline_of(window, device.allocator()),
        sharding=workload.shares,
        otherwise=_otherwise(planned, probe, found),
        method=found.method,
        warnings=tuple(warnings(probe, run, found, limit)),
        versions={
            "autobatch": _version.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=0.0,
    )


def _key(request: _Request, probe: Probe) -> str:
    """Name everything that a plan depends on; what a GPU's neighbours hold is looked at later."""
    device, spec = probe.device, probe.device.spec
    if device.evidence == "measured":
        spec = replace(spec, context_bytes=0)
    return plan_cache.plan_key(
        probe.workload,
        spec,
        {
            "target": request.target,
            "world_size": request.world_size,
            "headroom": probe.headroom,
            "prove": request.prove,
            "evidence": device.evidence,
            "allowed_bytes": device.allowed_bytes,
            "driver": driver_version() if device.evidence == "measured" else None,
        },
    )


def _known(key: str, request: _Request, probe: Probe) -> Plan | None:
    """Return the plan of an earlier call that still holds."""
    plan = plan_cache.find(key)
    if plan is None:
        return None
    grown = probe.device.others_bytes - plan.others_bytes
    if not -_NEIGHBOURS_LEFT_BYTES <= grown <= _NEIGHBOURS_GREW_BYTES:
        return None
    if request.cache == "confirm":
        with probe.device.hosting(probe.workload):
            probe.execute(plan.micro_batch, min(plan.accumulation_steps, 2))
        if not probe.trials[-1].fits:
            return None
        plan = replace(plan, trials=(*plan.trials, *probe.trials))
    note = f"answered from the plan of {plan.created}, as nothing has changed since; cache=False or"
    return replace(plan, warnings=(*plan.warnings, f"{note} --no-cache probes again"))


def _limit(workload: Workload, device: Device, samples_per_rank: int) -> int:
    """Return the largest micro-batch to consider."""
    limit = workload.sample_limit or max(_LARGEST, samples_per_rank)
    free = free_host_bytes() if device.evidence == "measured" else None
    if free is None:
        return limit
    sample_bytes = sum(tensor.nbytes for tensor in tensors(workload.batch(2))) / 2
    return min(limit, max(2, int(free / 4 / max(sample_bytes, 1))))


def _simulated_ceiling(probe: Probe, limit: int) -> int | None:
    """Return what the simulation takes for the ceiling of a card whose traces do not align."""
    spec = probe.device.spec
    outside = max(spec.capacity_bytes - probe.device.usable_bytes, 0)
    simulated = Probe(
        device=VirtualGpu(replace(spec, context_bytes=outside)),
        workload=probe.workload,
        accumulation_steps=probe.accumulation_steps,
        headroom=probe.headroom,
        progress=silent,
    )
    try:
        return find_ceiling(simulated, limit).micro_batch or None
    except AutobatchError:  # it is a first guess only
        return None


def predict(
    model: nn.Module | Workload,
    *,
    micro_batch: int,
    accumulation_steps: int = 1,
    sample: Any = None,
    loss: Loss | None = None,
    optimizer: OptimizerSpec | None = None,
    gpu: Gpu = None,
    world_size: int = 1,
    sharding: Sharding | None = None,
    autocast: str | None = None,
    clip_norm: float | None = None,
    progress: ProgressCallback = silent,
) -> Footprint:
    """Account for the memory of two training windows at one micro-batch, whether or not they fit.

    Always simulated; a device of this machine stands for a card like it. Takes the arguments of
    `tune`. From the second micro-batch of a window on all are alike, so two of them are executed
    for any number of accumulation steps above one. Of several GPUs, the footprint is rank 0's.

    Raises:
        UsageError: an argument cannot be understood; the subclass says which kind.
        WorkloadError: the model, loss or optimizer failed.
    """
    for name, value in (("micro_batch", micro_batch), ("accumulation_steps", accumulation_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name} is {value!r}: use a whole number of at least 1")
    device = VirtualGpu(_described(gpu))
    workload = Asked(
        model=model,
        sample=sample,
        loss=loss,
        optimizer=optimizer,
        autocast=autocast,
        clip_norm=clip_norm,
        world_size=world_size,
        sharding=sharding,
    ).workload()
    probe = Probe(
        device=device,
        workload=workload,
        accumulation_steps=min(accumulation_steps, 2),
        progress=progress,
    )
    run = probe.run(micro_batch)
    footprint = footprint_of(run.trace, run.replay, device.spec, device.evidence, simulated=True)
    return replace(footprint, accumulation_steps=accumulation_steps)


def _device(gpu: Gpu) -> Device:
    if is_device(gpu):
        return CudaGpu(Card(_cuda_index(gpu)))
    return VirtualGpu(_described(gpu))


def _described(gpu: Gpu) -> GpuSpec:
    """Return the card to simulate; one in this machine is described as the catalogue would."""
    if isinstance(gpu, GpuSpec):
        return gpu
    if is_device(gpu):
        properties = torch.cuda.get_device_properties(_cuda_index(gpu))
        capability = properties.major, properties.minor
        return describe(properties.name, properties.total_memory, capability)
    if isinstance(gpu, str):
        return find_gpu(gpu)
    raise UsageError(
        f"gpu is {gpu!r}: use a name such as 'a100-40gb', a size, a GpuSpec, or a device such as "
        "'cuda:0'"
    )


def _cuda_index(gpu: Gpu) -> int:
    """Return the index of a CUDA device of this machine.

    Raises:
        NoGpuError: there is none, or none of that index.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise NoGpuError(
            "there is no CUDA GPU in this machine: name the one to simulate, such as "
            'gpu="a100-40gb" (`autobatch gpus` lists them) or gpu="24GiB"'
        )
    index = None if gpu is None else torch.device(str(gpu)).index
    if index is not None and index >= count:
        raise NoGpuError(f"there is no {gpu} in this machine: it has {count}, from cuda:0 on")
    return torch.cuda.current_device() if index is None else index


def _require_sensible(headroom: float) -> None:
    if not isinstance(headroom, (int, float)) or not 0 <= headroom < 1:
        raise UsageError(f"headroom is {headroom!r}: use a share of at least 0 and below 1")


def _planned(request: _Request, probe: Probe, found: Ceiling) -> tuple[Split, Trace, Footprint]:
    """Return the split, the trace of the window that will run, and its account.

    On a real GPU the window that will run is run; should it not fit below a ceiling that does, the
    next smaller split is tried.
    """
    ceiling = found.micro_batch
    while True:
        planned = split(request.target, ceiling=ceiling, world_size=request.world_size)
        steps, size = min(planned.accumulation_steps, 2), planned.micro_batch
        if probe.device.evidence != "measured" and steps == probe.accumulation_steps:
            return planned, *_at(probe, found, size)
        if found.whole is not None:
            run = found.whole
        elif steps == probe.accumulation_steps:
            run = probe.run(size)
        else:  # without accumulation no gradient waits in memory, so this is a window of its own
            run = probe.execute(size, steps)
        if run.fits(probe.budget_bytes) or probe.device.evidence != "measured":
            return planned, run.trace, _footprint(probe, run.trace, run.replay)
        ceiling = size - 1
        if not ceiling:
            raise DoesNotFitError(what_is_missing(probe, found))


def _footprint(
    probe: Probe, trace: Trace, replayed: Replay, evidence: Evidence | None = None
) -> Footprint:
    """Account for a window that the device ran, or for one that is known otherwise."""
    device = probe.device
    return footprint_of(
        trace,
        replayed,
        device.spec,
        evidence or device.evidence,
        simulated=device.evidence == "simulated",
        held_bytes=device.allocator().allocated_bytes,
    )


def _at(probe: Probe, found: Ceiling, size: int) -> tuple[Trace, Footprint]:
    """Return the trace of the probed window at a size, and its account."""
    if size in probe.runs or found.model is None:
        run = probe.run(size)
        return run.trace, _footprint(probe, run.trace, run.replay)
    trace = found.model.trace(size)
    replayed = found.predicted.get(size) or probe.predict(found.model, size)
    return trace, _footprint(probe, trace, replayed, "predicted")


def _otherwise(planned: Split, probe: Probe, found: Ceiling) -> WindowMemory | None:
    """Account for one GPU's samples of an update at once, or in two halves if that is the plan."""
    samples = max(map(sum, planned.windows))
    if found.model is None or samples == 1:
        return None
    if planned.accumulation_steps == 1:
        _, halves = _at(probe, found, -(-samples // 2))
        return WindowMemory(
            micro_batch=halves.micro_batch,
            accumulation_steps=2,
            categories=halves.categories,
            peak_allocated_bytes=halves.peak_allocated_bytes,
            evidence=halves.evidence,
        )
    trace = found.model.trace(samples)
    return whole_window(trace, "predicted", probe.device.allocator())


def _curve(probe: Probe, found: Ceiling) -> tuple[MemoryPoint, ...]:
    points = {size: memory_point(size, r, "predicted") for size, r in found.predicted.items()}
    for size, run in probe.runs.items():
        if run.is_free:
            points[size] = memory_point(size, run.replay, probe.device.evidence)
    if found.model is not None:
        for size in curve_sizes(found.micro_batch, known=points):
            points[size] = memory_point(size, probe.predict(found.model, size), "predicted")
    return tuple(points[size] for size in sorted(points))


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
