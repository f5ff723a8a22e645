"""What a plan says, without what it can do: fields, and figures that follow from them.

Modules below `autobatch.plan` take this record; users hold the `Plan` that extends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from autobatch.gpus.catalogue import GpuSpec
from autobatch.gpus.uncertainty import likelihood_of
from autobatch.records.applied import AppliedLever
from autobatch.records.evidence import (
    MemoryPoint,
    ModelFacts,
    SpeedPoint,
    Timeline,
    Trial,
    WindowMemory,
)
from autobatch.records.footprint import Footprint
from autobatch.records.holders import Lives, PeakBlocks
from autobatch.records.split import Split
from autobatch.records.what_if import WhatIf

__all__ = ["Objective", "PlanRecord"]

Objective = Literal["largest", "fastest", "balanced"]
"""Which of the micro-batches that fit is planned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """What to run on each device, and how it is known.

    Attributes:
        target: the effective batch asked for.
        split: how the target is divided into micro-batches over ranks and accumulation steps.
        ceiling: largest micro-batch that fits; None where the search stopped at its upper limit.
        ceiling_at_least: largest micro-batch known to fit (the ceiling where that is known).
        budget_bytes: what the run may reserve: (capacity - context - others) x (1 - headroom).
        others_bytes: what other processes hold on the GPU; 0 where the GPU is virtual.
        allowed_bytes: what `set_per_process_memory_fraction` lets the process reserve; None where
            it sets no limit.
        footprint: bytes by category at the planned micro-batch.
        ceiling_footprint: the same at the ceiling.
        curve: memory against micro-batch, for the chart.
        method: "trace model", "trace model (quadratic)" or "bisection".
        sharding: how the ranks divide the model: "ddp", "fsdp", or "custom" for a function of the
            user's; None for a single rank.
        otherwise: the memory of the same update on one GPU without accumulation or, where the plan
            has none, in two halves; None where the trials do not show it.
        batch_dims: where the batch dimension of the sample was said to be, by path: a dimension,
            "list" or "whole"; None where it was not said.
        objective: what was asked for: the "largest" micro-batch, the "fastest", or the smallest
            within 3 % of the fastest ("balanced").
        speed: what splits of the target take, where time was asked for, largest micro-batch first.
        loader_samples_per_s: what the user's loader gives, where it was passed.
        command: the command that asked for it, as it was typed; None where Python code did.
        peak_blocks: what is alive at the peak, most bytes first; empty where it is not known.
        lives: the largest blocks of the windows in `timeline`; None where they are not known.
        most_bytes: by category, the most bytes that are alive at once in the traced windows.
        warnings: what the user must act on, one line each.
        notes: what was inferred, assumed or left out, one line each.
        what_if: ceilings on other cards and with other headrooms, and the peaks of other
            micro-batches; None where other windows than the plan's would have to run first.
        levers: what the run was changed by before it was planned, in the order in which it was
            applied; training needs the same.
    """

    split: Split
    ceiling: int | None
    ceiling_at_least: int
    headroom: float
    budget_bytes: int
    gpu: GpuSpec
    model: ModelFacts
    footprint: Footprint
    ceiling_footprint: Footprint
    trials: tuple[Trial, ...]
    curve: tuple[MemoryPoint, ...]
    timeline: Timeline
    method: str
    warnings: tuple[str, ...]
    versions: Mapping[str, str]
    created: str
    seconds: float
    others_bytes: int
    allowed_bytes: int | None
    sharding: Literal["ddp", "fsdp", "custom"] | None
    otherwise: WindowMemory | None
    batch_dims: Mapping[str, str] | None
    objective: Objective
    speed: tuple[SpeedPoint, ...]
    loader_samples_per_s: float | None
    command: str | None = None
    peak_blocks: tuple[PeakBlocks, ...]
    lives: Lives | None
    most_bytes: Mapping[str, int] | None
    notes: tuple[str, ...]
    what_if: WhatIf | None
    levers: tuple[AppliedLever, ...]

    @property
    def ceiling_likelihood(self) -> float | None:
        """How likely the ceiling is to fit a real GPU, by `autobatch.gpus.uncertainty`.

        None where it ran on the GPU.
        """
        return self._likelihood_of(self.ceiling_footprint)

    @property
    def likelihood(self) -> float | None:
        """How likely the planned micro-batch is to fit a real GPU; None where it ran on it."""
        return self._likelihood_of(self.footprint)

    def _likelihood_of(self, footprint: Footprint) -> float | None:
        if footprint.low_device_bytes is None:
            return None
        return likelihood_of(
            footprint.peak_reserved_bytes,
            round(self.budget_bytes / (1 - self.headroom)),
            self.footprint.kind or "convolutions",
            context_bytes=footprint.context_bytes,
            world_size=self.world_size,
        )

    @property
    def target(self) -> int:
        """The effective batch asked for."""
        return self.split.target

    @property
    def micro_batch(self) -> int:
        """Samples in one forward/backward on one GPU; the largest where sizes differ by one."""
        return self.split.micro_batch

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches between two optimizer updates."""
        return self.split.accumulation_steps

    @property
    def world_size(self) -> int:
        """GPUs that share the effective batch."""
        return self.split.world_size

    @property
    def effective_batch(self) -> int:
        """Samples in one optimizer update, over all ranks and accumulation steps."""
        return self.split.effective_batch

    @property
    def executions(self) -> int:
        """Trials that ran."""
        return len(self.trials)

    @property
    def ooms(self) -> int:
        """Trials that ran out of memory."""
        return sum(trial.oom for trial in self.trials)

    @property
    def proven(self) -> bool:
        """Whether the size above the ceiling ran, and did not fit."""
        above = self.ceiling_at_least + 1
        return any(trial.micro_batch == above and not trial.fits for trial in self.trials)

    @property
    def is_sharded(self) -> bool:
        """Whether the ranks share parameters, as FSDP2 does."""
        return self.sharding in ("fsdp", "custom")

    @property
    def slack_bytes(self) -> int:
        """What the planned micro-batch leaves of the budget."""
        return self.budget_bytes - self.footprint.peak_reserved_bytes
