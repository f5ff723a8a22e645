"""What a device is: something that runs a workload's training windows and tells what they took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from autobatch.footprint import Evidence
from autobatch.gpus import GpuSpec
from autobatch.trace import Trace
from autobatch.workload import Workload

__all__ = ["Device", "Run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Two training windows that ran.

    Attributes:
        trace: every allocation and free of them.
        seconds: wall time they took on the machine that ran them.
        loss: how the loss was obtained: "user", "output.loss", "scalar output", "surrogate sum".
        optimizer: class name of the optimizer.
        warnings: what the user should know about this run.
    """

    trace: Trace
    seconds: float
    loss: str
    optimizer: str
    warnings: tuple[str, ...]


class Device(Protocol):
    """A GPU, in the machine or simulated."""

    spec: GpuSpec
    evidence: Evidence

    def run(self, workload: Workload, *, micro_batch: int, accumulation_steps: int) -> Run:
        """Run two training windows.

        Raises:
            WorkloadError: the user's model, loss or optimizer failed.
        """
        ...
