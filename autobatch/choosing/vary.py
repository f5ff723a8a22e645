"""`vary`: the micro-batch along a parameter, such as the length of sequences, on one card.

Invariant: every ceiling is the one that `tune` finds for that value.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from autobatch.choosing.frontier import Frontier
from autobatch.choosing.outcomes import (
    Told,
    first_error,
    outcome_of,
    shared_warnings,
    window_of,
)
from autobatch.choosing.values import shown, whole_values
from autobatch.devices.base import Device
from autobatch.devices.choose import Gpu, choose_device
from autobatch.devices.copies import batch_of
from autobatch.devices.preserve import answering
from autobatch.errors import AutobatchError, UsageError, WorkloadError
from autobatch.plan.plan import Plan
from autobatch.records.comparison import FrontierPoint, Outcome
from autobatch.records.plan_record import Objective
from autobatch.records.progress import ProgressCallback, silent
from autobatch.support.units import format_bytes
from autobatch.support.wording import said_by
from autobatch.tuning.objective import require_objective
from autobatch.tuning.planning import probe_of
from autobatch.tuning.stamp import created_now, versions
from autobatch.tuning.streams import Stream
from autobatch.tuning.workloads import checked_target, stated, workload_of
from autobatch.workload.complete import Asked, WorkloadOptions, require_options
from autobatch.workload.spec.load import load_sized
from autobatch.workload.tree import tensors
from autobatch.workload.workload import Workload

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["vary"]

Build = Callable[[int], "nn.Module | Workload"]

_RETREAT = 0.9
"""The share of every bucket that is tried next where micro-batches of all do not fit together."""


@answering()
def vary(
    build: Build | str,
    values: Iterable[int],
    *,
    target: int,
    name: str | None = None,
    gpu: Gpu = None,
    objective: Objective = "largest",
    headroom: float | None = None,
    progress: ProgressCallback = silent,
    **options: Unpack[WorkloadOptions],
) -> Frontier:
    """Find the micro-batch for each value of a parameter: the length of sequences, say.

    Args:
        build: `build(value)` returns the module to train, or a Workload whose batches are of that
            size; or a SPEC with `name`: of a library's model, such as "hf:gpt2", or of a function
            of yours that takes an argument of that name.
        values: of the parameter, positive whole numbers.
        target: effective batch: samples per optimizer update over all GPUs.
        name: of the parameter; by default that of the first argument of `build`.
        gpu: as in `tune`: a card to simulate, or one in this machine, which is measured.
        objective: which of the micro-batches that fit is planned, as in `tune`.
        headroom: as in `tune`.
        progress: told of each step.
        **options: how the model trains, as `tune` takes it: loss, optimizer, autocast, clip_norm,
            world_size and sharding.

    Returns:
        The frontier; `print` shows it as a table, and `buckets()` gives the micro-batch by value
        for a loader. On a simulated card seconds and throughput are estimates. A value that is too
        large tells by how much; one that fails tells why.

    Raises:
        UsageError: an argument cannot be understood; the subclass says which kind.
        WorkloadError: the model, loss or optimizer failed with every value.

    >>> import torch
    >>> def build(width):
    ...     return Workload(model=nn.Linear(width, 8), batch=lambda n: torch.zeros(n, width))
    >>> found = vary(build, [64, 128], target=32, gpu="t4")
    >>> [(point.value, point.outcome.micro_batch) for point in found.points]
    [(64, 32), (128, 32)]
    """
    started = time.perf_counter()
    chosen = whole_values(values)
    require_options(vary, options)
    if "sample" in options or "batch_dims" in options:
        raise UsageError(
            "a sample is of one size: let build(value) return a Workload that makes its batches, "
            "and leave out sample and batch_dims"
        )
    if name is not None and not isinstance(name, str):
        raise UsageError(f"name is {shown(name)}: give the name of the parameter as text")
    builder, parameter = _builder(build, name)
    training = stated(options)
    target = checked_target(target, training.get("world_size", 1), headroom)
    require_objective(objective)
    search = _Search(
        builder=builder,
        parameter=parameter,
        target=target,
        gpu=gpu,
        objective=objective,
        headroom=headroom,
        options=training,
        told=Told(progress, len(chosen)),
    )
    return replace(search.frontier(chosen), seconds=time.perf_counter() - started)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tried:
    """A value that could be tried.

    Attributes:
        point: what was found.
        workload: of the value, as it was probed.
        device: that it was probed on.
        headroom: that was left free.
        plan: of it; None where nothing fits.
    """

    point: FrontierPoint
    workload: Workload
    device: Device
    headroom: float
    plan: Plan | None


@dataclass(frozen=True, slots=True)
class _Buckets:
    """Micro-batches by value that were simulated in one run, and what they reserve."""

    sizes: dict[int, int]
    reserved_bytes: int | None
    notes: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class _Search:
    """Finds what each value of a parameter can do."""

    builder: Build
    parameter: str
    target: int
    gpu: Gpu
    objective: Objective
    headroom: float | None
    options: WorkloadOptions
    told: Told

    def frontier(self, values: tuple[int, ...]) -> Frontier:
        """Go through the values, and put the answer together.

        Raises:
            UsageError: with every value.
            WorkloadError: with every value.
        """
        points: list[FrontierPoint] = []
        plans: dict[int, Plan] = {}
        makers: dict[int, Callable[[int], Any]] = {}
        structures: set[Hashable] = set()
        errors: list[AutobatchError] = []
        last: _Tried | None = None
        largest: _Tried | None = None
        for value in values:
            self.told.begin(f"{self.parameter}={value}")
            try:
                last = self._tried(value)
            except (UsageError, WorkloadError) as error:
                errors.append(error)
                points.append(FrontierPoint(value=value, outcome=Outcome(failure=str(error))))
                continue
            points.append(last.point)
            if last.plan is not None:
                largest = last
                plans[value], makers[value] = last.plan, last.workload.batch
                structures.add(_structure(last.workload.model))
        first_error(errors, of=len(values))
        assert last is not None
        one_model = len(structures) == 1
        buckets = self._buckets(plans, makers, largest, one_model=one_model)
        return Frontier(
            parameter=self.parameter,
            model=type(last.workload.model).__name__,
            gpu=last.device.spec,
            target=self.target,
            world_size=last.workload.world_size,
            headroom=last.headroom,
            points=tuple(replace(p, bucket=buckets.sizes.get(p.value)) for p in points),
            mixed_reserved_bytes=buckets.reserved_bytes,
            warnings=(
                *shared_warnings(self._by_value({n: p.warnings for n, p in plans.items()})),
                *self._sameness(points, one_model=one_model),
                *buckets.notes,
            ),
            notes=shared_warnings(self._by_value({n: p.notes for n, p in plans.items()})),
            versions=versions(),
            created=created_now(),
            seconds=0.0,
            plans=plans,
        )

    def _tried(self, value: int) -> _Tried:
        """Build the model for a value, and look for a plan.

        Raises:
            UsageError: there is no such model, or it cannot be split.
            WorkloadError: it failed.
        """
        device = choose_device(self.gpu)
        asked = Asked(model=partial(_built, self.builder, value), **self.options)
        probe = probe_of(
            workload_of(asked, self.gpu),
            device,
            target=self.target,
            headroom=self.headroom,
            progress=self.told,
        )
        plan, outcome = outcome_of(probe, self.target, self.objective)
        workload = probe.workload
        if plan is not None:
            with suppress(WorkloadError):
                outcome = replace(outcome, window=window_of(probe, plan))
        return _Tried(
            point=FrontierPoint(value=value, outcome=outcome, tokens_per_sample=_tokens(workload)),
            workload=workload,
            device=device,
            headroom=probe.headroom,
            plan=plan,
        )

    def _by_value(self, texts: Mapping[int, Sequence[str]]) -> dict[str, tuple[str, ...]]:
        """Return texts of plans; those that only differ in the value name the parameter."""
        named = {
            value: {each: re.sub(rf"\b{value}\b", self.parameter, each) for each in said}
            for value, said in texts.items()
        }
        told = [set(each.values()) for each in named.values()]
        everywhere = set.intersection(*told) if told else set()
        return {
            str(value): tuple(
                text if text in everywhere else as_said for as_said, text in said.items()
            )
            for value, said in named.items()
        }

    def _sameness(self, points: list[FrontierPoint], *, one_model: bool) -> list[str]:
        """Say where a parameter seems to change nothing."""
        fitting = [point for point in points if point.outcome.fits]
        peaks = {(p.outcome.ceiling_at_least, p.outcome.peak_reserved_bytes) for p in fitting}
        if len(fitting) < 2 or len(peaks) > 1 or not one_model:
            return []
        return [
            f"every {self.parameter} takes the same memory: the model and its batches may not "
            "depend on it"
        ]

    def _buckets(
        self,
        plans: dict[int, Plan],
        makers: dict[int, Callable[[int], Any]],
        largest: _Tried | None,
        *,
        one_model: bool,
    ) -> _Buckets:
        """Simulate micro-batches of all values in one run, with smaller ones until they fit."""
        if largest is None or largest.plan is None or len(plans) < 2:
            return _Buckets({}, None, ())
        if not one_model:
            why = f"the model has other parameters for each {self.parameter}"
            return _Buckets({}, None, (f"there are no buckets: {why}",))
        self.told.begin("buckets")
        sizes = {value: plan.micro_batch for value, plan in plans.items()}
        budget = largest.plan.budget_bytes
        while True:
            makes = tuple(partial(_fixed, makers[value], size) for value, size in sizes.items())
            mixed = replace(largest.workload, stream=makes)
            stream = Stream.of(mixed, largest.device, largest.plan.footprint)
            assert stream is not None
            if stream.why_not is not None:
                return _Buckets({}, None, (f"there are no buckets: {stream.why_not}",))
            if stream.fits(budget) or set(sizes.values()) == {1}:
                notes = self._bucket_notes(stream, budget, plans, sizes)
                return _Buckets(sizes, stream.reserved_bytes, notes)
            sizes = {value: max(int(_RETREAT * size), 1) for value, size in sizes.items()}

    def _bucket_notes(
        self, stream: Stream, budget: int, plans: dict[int, Plan], sizes: dict[int, int]
    ) -> tuple[str, ...]:
        notes = []
        if any(sizes[value] < plan.micro_batch for value, plan in plans.items()):
            notes.append(
                "buckets are smaller than the micro-batches of the plans: mixed in one run, those "
                "do not fit"
            )
        if stream.reserved_bytes > budget:
            notes.append(
                f"mixed in one run, micro-batches of all buckets reserve "
                f"{format_bytes(stream.reserved_bytes)}, the budget is {format_bytes(budget)}: the "
                f"allocator has to release its cache, which stalls the GPU{stream.remedy()}"
            )
        return tuple(notes)


def _fixed(make: Callable[[int], Any], size: int, samples: int) -> Any:
    """Return a batch of a bucket's size, whatever number of samples is asked for."""
    return make(size)


def _structure(model: nn.Module) -> Hashable:
    return tuple((name, p.shape, p.dtype) for name, p in model.named_parameters())


def _tokens(workload: Workload) -> int | None:
    """Return the length of the first sequence of whole numbers in a batch, as tokens are."""
    for tensor in tensors(batch_of(workload.batch, 2)):
        if tensor.dim() == 2 and not (tensor.is_floating_point() or tensor.is_complex()):
            return int(tensor.shape[1])
    return None


def _builder(build: Build | str, name: str | None) -> tuple[Build, str]:
    """Return what builds the model for a value, and the name of the parameter.

    Raises:
        UsageError: it is no function, or a SPEC without the name of a parameter.
    """
    if isinstance(build, str):
        if not name:
            raise UsageError('name the parameter of the SPEC to vary, such as name="seq"')
        return partial(load_sized, build, name), name
    if not callable(build):
        raise UsageError(
            f"build is a {type(build).__name__}: use a function of the value that returns a model "
            "or a Workload, or a SPEC"
        )
    return build, name or _first_argument(build)


def _built(build: Build, value: int) -> nn.Module | Workload:
    """Build the model for a value.

    Raises:
        WorkloadError: the user's function raised; the original error is chained.
    """
    try:
        return build(value)
    except AutobatchError:
        raise
    except Exception as error:
        raise WorkloadError(f"build({value}) raised {said_by(error)}") from error


def _first_argument(build: Build) -> str:
    try:
        return next(iter(inspect.signature(build).parameters), "value")
    except (TypeError, ValueError):
        return "value"
