"""`tune` and `predict`: from a model to a plan, or to a footprint.

Invariant: the user's model, optimizer and random state are as before, whatever happens.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from autobatch.devices.base import MOST_STEPS
from autobatch.devices.choose import Gpu, choose_device, described
from autobatch.devices.preserve import answering
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import DoesNotFitError, UsageError
from autobatch.levers.setup import Setup
from autobatch.plan.plan import Plan
from autobatch.records.footprint import Footprint
from autobatch.records.plan_record import Objective
from autobatch.records.progress import ProgressCallback, silent
from autobatch.support.files import check_writable
from autobatch.support.ranks import ranks_here
from autobatch.support.wording import argument
from autobatch.tuning.agreement import agreed
from autobatch.tuning.cache import CacheEntry
from autobatch.tuning.isolation import apart
from autobatch.tuning.objective import require_objective
from autobatch.tuning.planning import footprint_on, plan_of, probe_of
from autobatch.tuning.probe import Probe
from autobatch.tuning.question import holds, question_of
from autobatch.tuning.streams import Stream, with_heaviest_batch
from autobatch.tuning.workloads import checked_target, whole, workload_of
from autobatch.workload.complete import Asked
from autobatch.workload.sample import BatchDims
from autobatch.workload.workload import Loss, OptimizerSpec, Sharding, Workload

__all__ = ["Gpu", "predict", "tune"]


def tune(
    model: nn.Module | Workload | Callable[[], nn.Module | Workload],
    *,
    target: int,
    sample: Any = None,
    batch_dims: BatchDims = None,
    loss: Loss | None = None,
    optimizer: OptimizerSpec | str | None = None,
    gpu: Gpu = None,
    world_size: int | None = None,
    sharding: Sharding | None = None,
    headroom: float | None = None,
    autocast: str | torch.dtype | None = None,
    clip_norm: float | None = None,
    prove: bool = False,
    objective: Objective = "largest",
    loader: Iterable[Any] | None = None,
    isolate: bool = False,
    time_limit: float | None = None,
    cache: str | os.PathLike[str] | Literal[False] | None = None,
    progress: ProgressCallback = silent,
) -> Plan:
    """Find the micro-batch that fits and the accumulation steps that make the target exactly.

    Args:
        model: the module to train, on any device (`meta` included), or a Workload; or a function
            that builds one, which finds the card in `torch.cuda` also where it is simulated.
        target: effective batch: samples per optimizer update over all GPUs.
        sample: one batch (any pytree of tensors), a Dataset or a DataLoader; inferred if None.
        batch_dims: which dimension of the sample is the batch, where that is not the first one:
            one for all tensors, or one by name, such as `{"src": 1}`; see `batch_builder`.
        loss: `loss(model, batch)` gives a scalar; a criterion such as `nn.CrossEntropyLoss()`
            compares outputs with labels, of a batch that is (inputs, labels). None takes the
            output's `.loss`, a scalar output, cross entropy where the batch is a pair of inputs and
            classes, or the sum of the outputs with a warning.
        optimizer: an instance, a class, a callable on parameters, or a name such as "adamw"; a
            list or dict of several, all of which step; AdamW if None. See `Workload`.
        gpu: a catalogue name, a size such as "24GiB", or a GpuSpec, which is simulated; a device
            such as "cuda:1" is measured, and so is the current one if None.
        world_size: GPUs that share the effective batch. None is a Workload's own, or 1; but where
            a process group of several ranks is initialised it is their number: all of them have
            to call `tune`, and get the plan of the one that holds least.
        sharding: "ddp" (None on several GPUs), "fsdp" for PyTorch's FSDP2, or a function that
            applies `fully_shard` to the model; figures are those of rank 0. See `Workload`.
        headroom: share of the usable memory to leave free, in [0, 1); None leaves 0.05 on a GPU
            that is measured, and on a simulated one what `autobatch.gpus.uncertainty` asks for.
        autocast: "bf16", "fp16", their dtype, or None.
        clip_norm: norm that gradients are clipped to, or None.
        prove: also run the size above the ceiling, and show that it does not fit.
        objective: which micro-batch of those that fit is planned: the "largest"; the "fastest", for
            which windows of several splits of the target are timed on a GPU that is measured, and
            estimated on a simulated one; or "balanced", the smallest that is at most 3 % slower.
        loader: what gives your training its batches; it is timed for a few seconds, and no
            micro-batch is called faster than it.
        isolate: probe in a child process, which a fatal CUDA error, a crash or a hang ends in
            place of this one. Everything passed has to be picklable.
        time_limit: seconds that one trial may take before the child is ended; with `isolate`.
        cache: a file to answer from where it holds the plan of the same call, and to keep the plan
            in otherwise. The same means: arguments, structure of the model, shapes of a batch,
            GPU, versions, settings, and the source files of yours that are loaded. A note of
            the plan says where it comes from. With `loader`, which is timed anew, nothing is kept.
            `plan.save` and `Plan.load` are the way of notebooks.
        progress: told of each step.

    Raises:
        UsageError: an argument cannot be understood; the subclass says which kind.
        WorkloadError: the model, loss or optimizer failed.
        DoesNotFitError: not even micro-batch 1 fits.
        ProbeDiedError: the child process died or took too long.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    >>> batch = torch.zeros(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64)
    >>> plan = tune(model, sample=batch, loss=nn.CrossEntropyLoss(), target=256, gpu="t4")
    >>> plan.micro_batch, plan.accumulation_steps, plan.effective_batch
    (256, 1, 256)

    `print(plan)` shows where every byte goes and how sure that is; `plan.report("out")` writes a
    page; `for window in plan.windows(loader, optimizer)` trains by it.
    """
    require_objective(objective)
    ranks = ranks_here()
    agrees = world_size is None and ranks > 1
    asked = Asked(
        model=model,
        sample=sample,
        batch_dims=batch_dims,
        loss=loss,
        optimizer=optimizer,
        autocast=autocast,
        clip_norm=clip_norm,
        world_size=ranks if world_size is None else world_size,
        sharding=sharding,
    )
    target = checked_target(target, asked.world_size, headroom)
    if time_limit is not None and not isolate:
        raise UsageError("time_limit ends a child process: pass isolate=True with it")
    is_time = isinstance(time_limit, (int, float)) and 0 < time_limit < math.inf
    if time_limit is not None and not is_time:
        raise UsageError(
            f"time_limit is {time_limit!r}: give seconds, more than 0, or None for no limit"
        )
    file = _checked_file(cache) if cache else None
    request = _Request(
        target=target,
        headroom=headroom,
        prove=prove,
        objective=objective,
        loader=loader,
        cache=file,
    )
    make = partial(_tuned, request, asked, gpu, progress=progress)
    if isolate:
        make = partial(apart, _tuned, request, asked, gpu, progress=progress, time_limit=time_limit)
    with answering():
        return agreed(make) if agrees else make()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What is asked about a workload on a device."""

    target: int
    headroom: float | None
    prove: bool
    objective: Objective
    loader: Iterable[Any] | None
    cache: Path | None


def _tuned(request: _Request, asked: Asked, gpu: Gpu, *, progress: ProgressCallback) -> Plan:
    started = time.perf_counter()
    device = choose_device(gpu)
    workload = workload_of(asked, gpu)
    probe = probe_of(
        workload, device, target=request.target, headroom=request.headroom, progress=progress
    )
    entry = None
    if request.cache is not None and request.loader is None:  # how fast one is differs
        question = question_of(
            probe, target=request.target, prove=request.prove, objective=request.objective
        )
        entry = CacheEntry(request.cache, question)
    if entry is not None and (known := entry.find()) is not None and holds(known, device):
        return replace(known, seconds=time.perf_counter() - started)
    try:
        plan = plan_of(
            probe,
            target=request.target,
            prove=request.prove,
            objective=request.objective,
            loader=request.loader,
        )
    except DoesNotFitError as error:
        if not isinstance(device, VirtualGpu):
            raise
        from autobatch.tuning.remedies import with_remedies  # levers are not for runs that fit

        raise with_remedies(
            error,
            asked,
            Setup(workload=probe.workload, gpu=device.spec),
            target=request.target,
            headroom=request.headroom,
            progress=progress,
        ) from None
    plan = replace(plan, seconds=time.perf_counter() - started)
    if entry is not None:
        entry.store(plan)
    return plan


def _checked_file(cache: str | os.PathLike[str]) -> Path:
    """Return the file of a cache.

    Raises:
        UsageError: it is no path, or the code that calls cannot be told from an edited one.
        FileError: it cannot be written.
    """
    if not isinstance(cache, (str, os.PathLike)):
        raise UsageError(f"cache is {cache!r}: name a file to keep the plan in, or leave it out")
    if hasattr(sys, "ps1") or sys.argv[0] in ("", "-"):
        raise UsageError(
            "cache= compares the source files of a script, and an interactive session has none: "
            "keep the plan with plan.save(file), and read it with Plan.load(file)"
        )
    return check_writable(cache)


@answering()
def predict(
    model: nn.Module | Workload | Callable[[], nn.Module | Workload],
    *,
    micro_batch: int,
    accumulation_steps: int = 1,
    sample: Any = None,
    batch_dims: BatchDims = None,
    loss: Loss | None = None,
    optimizer: OptimizerSpec | str | None = None,
    gpu: Gpu = None,
    world_size: int = 1,
    sharding: Sharding | None = None,
    autocast: str | torch.dtype | None = None,
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

    >>> footprint = predict(nn.Linear(784, 10), micro_batch=32, gpu="t4")
    >>> footprint.parameters_bytes, footprint.peak_device_bytes < 2**28
    (31400, True)
    """
    micro_batch, accumulation_steps = whole(micro_batch), whole(accumulation_steps)
    for name, value in (("micro_batch", micro_batch), ("accumulation_steps", accumulation_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{argument(name)} is {value!r}: use a whole number of at least 1")
    if micro_batch > _ADDRESSES:
        raise _beyond_addresses(micro_batch)
    device = VirtualGpu(described(gpu))
    asked = Asked(
        model=model,
        sample=sample,
        batch_dims=batch_dims,
        loss=loss,
        optimizer=optimizer,
        autocast=autocast,
        clip_norm=clip_norm,
        world_size=world_size,
        sharding=sharding,
    )
    workload = with_heaviest_batch(workload_of(asked, gpu), device)
    probe = Probe(
        device=device,
        workload=workload,
        accumulation_steps=min(accumulation_steps, MOST_STEPS),
        progress=progress,
    )
    run = probe.run(micro_batch)
    if not run.replay.fits:  # there is no other limit than that of addresses
        raise _beyond_addresses(micro_batch)
    footprint = footprint_on(device, workload, run.trace, run.replay)
    footprint = replace(footprint, accumulation_steps=accumulation_steps)
    stream = Stream.of(workload, device, footprint)
    return footprint if stream is None else stream.footprint(footprint)


_ADDRESSES = 2**47
"""As many bytes as a process can address; samples that take none are no batch."""


def _beyond_addresses(micro_batch: int) -> UsageError:
    return UsageError(
        f"{argument('micro_batch')} is {micro_batch:,}: it needs more memory than there are "
        "addresses; use a smaller one"
    )
