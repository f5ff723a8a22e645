"""A probe: one workload on one device, executed at the sizes that a search asks for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from autobatch.devices.base import Device, Run
from autobatch.devices.virtual.ahead import Task
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.budget import budget_bytes
from autobatch.memory.replay import Replay, simulate
from autobatch.memory.trace_model import TraceModel
from autobatch.records.evidence import Trial
from autobatch.records.progress import Progress, ProgressCallback
from autobatch.support.wording import count
from autobatch.workload.workload import Workload

__all__ = ["Probe"]

_EXPECTED = 2
"""Executions of most searches, for the progress that is shown."""

_ACTIONS = {"simulated": "simulating two training windows", "measured": "running windows"}


@dataclass(slots=True)
class Probe:
    """Executes a workload at sizes, and keeps the evidence.

    Attributes:
        headroom: share of the usable memory that stays free.
        trials: every execution, in order.
        runs: what each execution of the probed window gave, by micro-batch.
    """

    device: Device
    workload: Workload
    accumulation_steps: int
    progress: ProgressCallback
    headroom: float = 0.0
    trials: list[Trial] = field(default_factory=list)
    runs: dict[int, Run] = field(default_factory=dict)

    @property
    def budget_bytes(self) -> int:
        """What the windows may reserve; on a real GPU it falls while its context grows."""
        return budget_bytes(self.device.usable_bytes, self.headroom)

    def run(self, micro_batch: int) -> Run:
        """Execute a size, once."""
        if micro_batch not in self.runs:
            self.execute(micro_batch, self.accumulation_steps)
        return self.runs[micro_batch]

    def foreseen(self, *micro_batches: int) -> list[Task]:
        """Return tasks for helpers: sizes that will probably be executed; none on a real GPU."""
        if not isinstance(self.device, VirtualGpu):
            return []
        new = [size for size in micro_batches if size not in self.runs]
        return self.device.foreseen(self.workload, new, self.accumulation_steps)

    def execute(self, micro_batch: int, accumulation_steps: int) -> Run:
        """Run two windows and log the trial; runs of the probed window are remembered."""
        evidence = self.device.evidence
        begin = Progress(
            step=f"{_ACTIONS[evidence]} of {count(accumulation_steps, 'accumulation step')}",
            executions=len(self.trials),
            expected=max(_EXPECTED, len(self.trials) + 1),
            micro_batch=micro_batch,
        )
        self.progress(begin)
        run = self.device.run(
            self.workload, micro_batch=micro_batch, accumulation_steps=accumulation_steps
        )
        trial = Trial(
            micro_batch=micro_batch,
            accumulation_steps=accumulation_steps,
            fits=run.fits(self.budget_bytes),
            oom=run.shortage is not None,
            alloc_retries=run.replay.alloc_retries,
            peak_allocated_bytes=run.replay.peak_allocated_bytes,
            peak_reserved_bytes=run.replay.peak_reserved_bytes,
            seconds=run.seconds,
            evidence=evidence,
            window_seconds=run.window_seconds,
            window_range=run.window_range,
        )
        self.trials.append(trial)
        if accumulation_steps == self.accumulation_steps:
            self.runs[micro_batch] = run
        self.progress(replace(begin, executions=len(self.trials), trial=trial))
        return run

    def fits(self, micro_batch: int) -> bool:
        """Execute a size, once, and tell whether it stays within the budget."""
        return self.run(micro_batch).fits(self.budget_bytes)

    def peak_bytes(self, micro_batch: int) -> int | None:
        """Return what an executed size reserved; None where the limit had a hand in it."""
        run = self.runs[micro_batch]
        return run.replay.peak_reserved_bytes if run.is_free else None

    def predict(self, model: TraceModel, micro_batch: int) -> Replay:
        """Return what the allocator would do with the model's trace at a size.

        Raises:
            Misaligned: the model foretells sizes there that cannot be.
        """
        sizes, events, streams = model.requests(micro_batch)
        return simulate(sizes, events, allocator=self.device.allocator(), streams=streams)
