"""What a device is: it runs a workload's training windows, and tells what memory they took."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from autobatch.gpus.catalogue import GpuSpec
from autobatch.gpus.work import WindowWork
from autobatch.memory.allocator import CachingAllocator
from autobatch.memory.replay import Replay
from autobatch.memory.trace import Trace
from autobatch.records.footprint import Evidence
from autobatch.workload.counts import ModelCounts
from autobatch.workload.workload import Workload

__all__ = ["MOST_STEPS", "WINDOWS", "Device", "Run", "SimulatedDevice"]

WINDOWS = 2
"""Windows of a run: optimizer state appears in the first, the second peaks as all later ones do."""

MOST_STEPS = 2
"""Micro-batches that stand for any larger number of them: from a window's second on all are alike,
as the first makes the gradients and the others add to them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Two training windows that ran, or that ran out of memory on the way.

    Attributes:
        trace: every allocation and free of them; incomplete where there was a shortage.
        replay: what the allocator, real or simulated, did with the trace.
        seconds: wall time of the whole run on the machine that ran it.
        window_seconds: median time of a window after warm-up; None where nothing was computed.
        window_range: that of the fastest and of the slowest.
        shortage: which request failed for lack of memory, in one line; None where none did.
        loss: how the loss was obtained: "user", "output.loss", "mean of output.loss",
            "scalar output", "cross entropy" or "surrogate sum".
        loss_code: the expression of `model` and `batch` that it is; None where it is the user's
            function, or a stand-in.
        optimizer: class name of the optimizer, or names of several.
        grown_bytes: by how much what is alive after a window grew from the first to the second.
        notes: what the user should know about this run.
        work: what the last window computes and moves; None where it was not counted.
        counts: of the copy of the model, where changes were applied to it; else None.
    """

    trace: Trace
    replay: Replay
    seconds: float
    window_seconds: float | None = None
    window_range: tuple[float, float] | None = None
    shortage: str | None = None
    loss: str
    optimizer: str
    grown_bytes: int = 0
    notes: tuple[str, ...]
    work: WindowWork | None = None
    counts: ModelCounts | None = None
    loss_code: str | None = None

    @property
    def is_free(self) -> bool:
        """Whether the windows ran through, and the allocator never had to retry or fail."""
        return self.shortage is None and self.replay.fits

    def fits(self, budget_bytes: int) -> bool:
        """Return whether the windows ran through without a retry and within a budget."""
        return self.is_free and self.replay.peak_reserved_bytes <= budget_bytes


class Device(Protocol):
    """A GPU, in the machine or simulated.

    Attributes:
        evidence: how its figures are known.
        is_simulated: whether the card is not there, so that its figures are uncertain.
        default_headroom: share of the usable memory to leave free where the user names none.
        scratch_varies: whether kernels choose scratch memory by shape, so that a micro-batch
            between two that ran may need more than a straight line between them says.
        must_run_the_plan: whether a micro-batch has to run before a plan may name it.
    """

    evidence: Evidence
    is_simulated: bool
    default_headroom: float
    scratch_varies: bool
    must_run_the_plan: bool

    @property
    def spec(self) -> GpuSpec:
        """The card, with the largest CUDA context that was seen so far."""
        ...

    @property
    def others_bytes(self) -> int:
        """Bytes that other processes hold on the card."""
        ...

    @property
    def usable_bytes(self) -> int:
        """Bytes that a run may reserve, before any headroom."""
        ...

    @property
    def allowed_bytes(self) -> int | None:
        """Bytes that `set_per_process_memory_fraction` allows the process; None for no limit."""
        ...

    def require(self, workload: Workload) -> None:
        """Refuse a workload that this device cannot run.

        Raises:
            UsageError: it cannot.
        """
        ...

    def host_limit_bytes(self) -> int | None:
        """Return the bytes of host memory that a batch may take; None for no limit."""
        ...

    def simulated(self) -> SimulatedDevice:
        """Return a simulated device like this one: itself where it is one."""
        ...

    def allocator(self) -> CachingAllocator:
        """Return a simulated allocator in the state in which runs begin."""
        ...

    def hosting(self, workload: Workload) -> AbstractContextManager[None]:
        """Make room for runs of a workload, and put everything back afterwards."""
        ...

    def run(self, workload: Workload, *, micro_batch: int, accumulation_steps: int) -> Run:
        """Run two training windows.

        Raises:
            WorkloadError: the user's model, loss or optimizer failed.
        """
        ...

    def labelled(self, workload: Workload, trace: Trace) -> Trace:
        """Return a trace of a run with the op and the module of each block, as far as known."""
        ...

    def notes(self) -> tuple[str, ...]:
        """Return what the user should know about the card itself, as it was seen so far."""
        ...


class SimulatedDevice(Device, Protocol):
    """A GPU that is not in the machine, which runs any number of windows."""

    def run(
        self,
        workload: Workload,
        *,
        micro_batch: int,
        accumulation_steps: int,
        windows: int = WINDOWS,
    ) -> Run:
        """Run training windows.

        Raises:
            WorkloadError: the user's model, loss or optimizer failed.
        """
        ...
