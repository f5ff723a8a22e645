"""The GPU in the machine: windows that really run, measured by its own allocator.

Copies of the user's objects run; what the user has on the GPU waits in host memory meanwhile.
Invariant: after `hosting`, the model, its gradients, the optimizer's state, random states and the
allocator's peaks are as before, whatever happened inside.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from autobatch.devices.base import WINDOWS, Run
from autobatch.devices.copies import Copier, flatten_weights_as
from autobatch.devices.cuda.memory_history import HistoryRecorder
from autobatch.devices.cuda.offload import HostOffload, put_back_what_waits
from autobatch.devices.cuda.runtime import CudaRuntime, Stats
from autobatch.devices.one_card import require_one_card
from autobatch.devices.preserve import process_state_preserved
from autobatch.devices.session import Session, user_errors
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import AutobatchError, UsageError
from autobatch.gpus.budget import (
    OutsideMemory,
    device_notes,
    outside_memory,
    spilled_bytes,
    usable_bytes,
)
from autobatch.gpus.catalogue import GpuSpec, find_gpu, find_installed
from autobatch.gpus.uncertainty import MEASURED_HEADROOM
from autobatch.memory.alignment import with_labels_of
from autobatch.memory.allocator import CachingAllocator
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.replay import Replay
from autobatch.memory.snapshot import Snapshot
from autobatch.memory.trace import Trace
from autobatch.records.footprint import Evidence
from autobatch.support.host_memory import free_host_bytes
from autobatch.support.interrupts import held, uninterrupted
from autobatch.support.oom import Shortage, attempt, let_go
from autobatch.support.units import format_bytes
from autobatch.support.wording import for_reader, given
from autobatch.workload.counts import ModelCounts
from autobatch.workload.workload import Workload
from autobatch.workload.wrappers import is_compiled, unwrapped

__all__ = ["CudaGpu", "describe"]

_TIMED_WINDOWS = 3
_TIMED_SECONDS = 4.0
"""Windows are timed until this many have run, or until they have taken this long."""


def describe(name: str, capacity_bytes: int, capability: tuple[int, int]) -> GpuSpec:
    """Return the catalogue's specification of a card, with the figures that the driver reports."""
    # what a card of any size is assumed to be
    known = find_installed(name, capacity_bytes) or find_gpu("24GiB")
    return replace(
        known,
        name=name,
        capacity_bytes=capacity_bytes,
        context_bytes=min(known.context_bytes, capacity_bytes // 8),
        compute_capability=capability,
        sources={**known.sources, "capacity_bytes": "cudaMemGetInfo"},
    )


class CudaGpu:
    """Runs workloads on a real GPU."""

    evidence: Evidence = "measured"
    is_simulated = False
    default_headroom = MEASURED_HEADROOM
    scratch_varies = True
    must_run_the_plan = True

    def __init__(self, runtime: CudaRuntime, *, labelled: bool = False):
        """Measure on `runtime`; `labelled` finds the op of every allocation, for reports."""
        self._runtime = runtime
        self._labelled = labelled
        self._readings = [runtime.reading()]
        self._known = describe(runtime.name, self._readings[0].capacity_bytes, runtime.capability)
        self._start: Snapshot | None = None  # the allocator's state in which runs begin
        self._offload = HostOffload(runtime.device)
        self._notes: list[str] = []
        self._spilled_bytes = 0

    @property
    def _outside(self) -> OutsideMemory:
        return outside_memory(*self._readings, typical_context_bytes=self._known.context_bytes)

    @property
    def spec(self) -> GpuSpec:
        """The card, with the largest context seen so far: it grows as windows load kernels."""
        return replace(self._known, context_bytes=self._outside.context_bytes)

    @property
    def others_bytes(self) -> int:
        """Bytes that other processes hold on the card."""
        return self._outside.others_bytes

    @property
    def allowed_bytes(self) -> int | None:
        """Bytes that `set_per_process_memory_fraction` allows the process; None for no limit."""
        return self._readings[0].allowed_bytes

    @property
    def usable_bytes(self) -> int:
        """Bytes that a run may reserve, before any headroom."""
        return usable_bytes(self._readings[0], self._outside)

    def require(self, workload: Workload) -> None:
        """Refuse sharded workloads, and models that are on several cards.

        Raises:
            UsageError: the ranks share parameters.
            WorkloadError: the model is on several cards.
        """
        require_one_card(workload.model)
        if workload.is_sharded:
            raise UsageError(
                "sharding is simulated only, not yet run on the GPU in the machine: name the card, "
                f"such as {given('gpu', 'a100-40gb')}"
            )

    def host_limit_bytes(self) -> int | None:
        """Return a quarter of the host's free memory; None where the host does not tell."""
        free = free_host_bytes()
        return None if free is None else free // 4

    def simulated(self) -> VirtualGpu:
        """Return a simulated card with the same memory left to use."""
        outside = max(self.spec.capacity_bytes - self.usable_bytes, 0)
        return VirtualGpu(replace(self.spec, context_bytes=outside))

    def allocator(self) -> CachingAllocator:
        """Return a simulated allocator in the state in which runs begin."""
        if self._start is None:
            return CachingAllocator(AllocatorSettings.of_environment())
        segments = self._start.segments.get(self._runtime.index, ())
        return CachingAllocator.from_segments(segments, self._start.settings)

    def notes(self) -> tuple[str, ...]:
        """Return what is known of other processes, memory spilled to the host, and limits."""
        own = device_notes(
            self._readings[0],
            self._readings[-1],
            typical_context_bytes=self._known.context_bytes,
            spilled=self._spilled_bytes,
        )
        return (*own, *self._notes)

    @contextlib.contextmanager
    def hosting(self, workload: Workload) -> Iterator[None]:
        """Keep everything of the workload that is on the card in host memory meanwhile.

        Raises:
            UsageError: PyTorch's memory history is being recorded already.
            WorkloadError: the host has no room for it.
            AutobatchError: it could not return to the card, or that of an earlier probe still
                cannot; the next call puts it back first.
        """
        if self._runtime.is_recording:
            raise UsageError(
                "PyTorch's memory history is being recorded, and a probe records its own: end it "
                f"with torch.cuda.memory._record_memory_history(None), or {_own_process()}"
            )
        gc.collect()  # cyclic garbage from before may hold memory of the card
        put_back_what_waits()
        with process_state_preserved(), self._runtime.selected():
            before = self._runtime.stats()
            try:
                self._include(workload)
                self._offload.offload()
                gc.collect()
                self._runtime.empty_cache()
                self._readings = [self._runtime.reading()]
                self._start = self._runtime.snapshot()
                yield
            finally:
                with uninterrupted():
                    gc.collect()
                    self._runtime.empty_cache()
                    self._offload.restore()
                    self._put_back_peaks(before)

    def _include(self, workload: Workload) -> None:
        """Include in the offload what a run will copy: a copier without memory visits all of it."""
        copier = Copier(torch.device("meta"), self._offload.include)
        copier.model(unwrapped(workload.model))
        for part in (workload.loss, workload.evaluate, workload.window):
            copier.any(part)
        copier.optimizers_of(workload.optimizer)

    def run(self, workload: Workload, *, micro_batch: int, accumulation_steps: int) -> Run:
        """Run two training windows, and a few more for the time they take.

        Raises:
            WorkloadError: the user's model, loss or optimizer failed; the cause is chained.
        """
        started = time.perf_counter()
        runtime = self._runtime
        recorder = HistoryRecorder(
            runtime,
            labelled=self._labelled,
            follows_modules=not is_compiled(workload.model),
        )
        before = runtime.stats()
        runtime.reset_peaks()
        with process_state_preserved(), held(), runtime.selected(), recorder.recording():
            try:
                with user_errors(workload, micro_batch):
                    done = attempt(
                        lambda: self._windows(recorder, workload, micro_batch, accumulation_steps)
                    )
            except BaseException as error:
                let_go(error)
                raise
        after = runtime.stats()
        gc.collect()
        spilled = spilled_bytes(self._readings[0], after.peak_reserved_bytes)
        self._spilled_bytes = max(self._spilled_bytes, spilled)
        self._readings.append(runtime.reading())
        runtime.empty_cache()
        self._start = runtime.snapshot()  # libraries may have taken memory for good
        shortage = done if isinstance(done, Shortage) else None
        facts = done if isinstance(done, _Facts) else _Facts()
        if (left := runtime.stats().allocated_bytes - before.allocated_bytes) > 0:
            facts.notes.append(
                f"{format_bytes(left)} were still allocated after a run at micro-batch "
                f"{micro_batch}: something outside the model keeps tensors of past micro-batches"
            )
        peak, timed = facts.peak or after, facts.window_seconds
        trace = recorder.trace(micro_batch, accumulation_steps)
        return Run(
            trace=trace,
            replay=Replay(
                peak_allocated_bytes=peak.peak_allocated_bytes,
                peak_reserved_bytes=peak.peak_reserved_bytes,
                peak_event=trace.peak_event() if trace.events else 0,
                alloc_retries=after.alloc_retries - before.alloc_retries,
                oom_event=len(trace.events) if shortage is not None else None,
            ),
            seconds=time.perf_counter() - started,
            window_seconds=median(timed) if timed else None,
            window_range=(min(timed), max(timed)) if timed else None,
            shortage=shortage,
            loss=facts.loss,
            loss_code=facts.loss_code,
            optimizer=facts.optimizer,
            grown_bytes=facts.grown_bytes,
            notes=tuple(facts.notes),
            counts=facts.counts,
        )

    def labelled(self, workload: Workload, trace: Trace) -> Trace:
        """Run the windows of a trace again, and return it with their ops and modules.

        PyTorch's profiler looks on; where it cannot, or the run fails, the trace stays as it is.
        """
        again = CudaGpu(self._runtime, labelled=True)
        again._offload = self._offload
        try:
            run = again.run(
                workload,
                micro_batch=trace.micro_batch,
                accumulation_steps=trace.accumulation_steps,
            )
        except (AutobatchError, RuntimeError):
            return trace
        return trace if run.shortage is not None else with_labels_of(trace, run.trace)

    def _windows(
        self,
        recorder: HistoryRecorder,
        workload: Workload,
        micro_batch: int,
        accumulation_steps: int,
    ) -> _Facts:
        copier = Copier(self._runtime.device, self._offload.copy_of)
        device, model = self._runtime.device, unwrapped(workload.model)
        prepared = partial(_prepared_like, workload.model)
        session = Session(workload, model, device, copier, recorder, prepared)
        try:
            session.train(micro_batch, accumulation_steps, windows=WINDOWS)
            recorder.stop()
            peak, notes, grown_bytes = self._runtime.stats(), session.notes, session.grown_bytes
            seconds: list[float] = []
            while (
                not self._labelled
                and len(seconds) < _TIMED_WINDOWS
                and sum(seconds) < _TIMED_SECONDS
            ):
                clock = self._runtime.clock()
                session.train(micro_batch, accumulation_steps, windows=1, evaluate=False)
                seconds.append(clock.seconds())
        finally:
            session.let_go()
        return _Facts(
            peak=peak,
            window_seconds=seconds,
            loss=session.loss_kind,
            loss_code=session.loss_code,
            optimizer=session.optimizer_name,
            notes=notes,
            grown_bytes=grown_bytes,
            counts=session.counts,
        )

    def _put_back_peaks(self, before: Stats) -> None:
        """Let the allocator's peaks read as before.

        PyTorch cannot set a peak: it is reset to what is allocated, then reached by allocating.
        """
        runtime = self._runtime
        runtime.reset_peaks()
        now = runtime.stats()
        with contextlib.suppress(torch.OutOfMemoryError):
            runtime.raise_peaks(
                allocated_bytes=max(before.peak_allocated_bytes - now.allocated_bytes, 0),
                reserved_bytes=max(before.peak_reserved_bytes - now.reserved_bytes, 0),
            )
        runtime.empty_cache()
        now = runtime.stats()
        for name in ("peak_allocated_bytes", "peak_reserved_bytes"):
            was, read = getattr(before, name), getattr(now, name)
            if was != read:
                self._notes.append(
                    f"the allocator's {name.replace('_', ' ')} were {was:,} before the probe and "
                    f"read {read:,} now, which PyTorch cannot set: to leave them alone, "
                    f"{_own_process()}"
                )


@dataclass(slots=True)
class _Facts:
    """What windows tell when they have run through."""

    peak: Stats | None = None
    window_seconds: list[float] = field(default_factory=list)
    loss: str = "user"
    loss_code: str | None = None
    optimizer: str = ""
    notes: list[str] = field(default_factory=list)
    grown_bytes: int = 0
    counts: ModelCounts | None = None


def _prepared_like(original: nn.Module, copied: nn.Module) -> nn.Module:
    """Lay a copy's weights out as the original's are, and compile it if the original is."""
    flatten_weights_as(unwrapped(original), copied)
    if not is_compiled(original):
        return copied
    inner: Any = original
    while not hasattr(inner, "_orig_mod") and hasattr(inner, "module"):
        inner = inner.module
    if hasattr(inner, "dynamo_ctx"):
        return inner.dynamo_ctx(copied)  # type: ignore[no-any-return]
    copied.compile()
    return copied


def _own_process() -> str:
    """Say how to probe in a process of its own."""
    return for_reader("pass isolate=True", "leave --no-isolate out")
