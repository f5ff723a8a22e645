"""Search a ceiling, then look at both sides of it by direct execution.

Invariant: the truth shares nothing with the search but the virtual GPU: n and n + 1 are executed
on a fresh one, and their traces replayed as they are.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import GpuSpec
from autobatch.records.progress import silent
from autobatch.support.units import format_bytes
from autobatch.tuning.ceiling import find_ceiling
from autobatch.tuning.probe import Probe
from autobatch.workload.workload import Workload

HEADROOM = 0.05
LIMIT = 2**16
STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the search said of one model on one GPU, and whether it is true.

    Attributes:
        ceiling: largest micro-batch that fits, as the search found it; 0 where nothing does.
        executions: training windows executed by the search, in pairs.
        fits: whether the ceiling fits when executed; vacuously true for 0.
        next_fits: whether one sample more does.
        reserved_bytes: peak at the ceiling and one above, as executed.
        seconds: of the search alone.
        degree: 2 where a block's size has a quadratic term, which a further execution finds.
        reason: why sizes were executed one by one; None where there is a trace model.
        kernels_vary: whether the windows at the ceiling have allocations that small ones have not.
    """

    model: str
    what: str
    gpu: str
    budget_bytes: int
    ceiling: int
    executed: tuple[int, ...]
    ooms: int
    method: str
    degree: int
    reason: str | None
    kernels_vary: bool
    fits: bool
    next_fits: bool
    reserved_bytes: tuple[int, int]
    seconds: float

    @property
    def allowed(self) -> int:
        return 4 if self.degree == 2 or self.kernels_vary or self.reason else 3

    @property
    def passes(self) -> bool:
        """Whether the ceiling is the true one and cost no more than allowed."""
        return (
            self.fits
            and not self.next_fits
            and len(self.executed) <= self.allowed
            and self.ooms == 0
        )


def check(name: str, what: str, workload: Workload, gpu: GpuSpec) -> Row:
    """Search, then execute the ceiling and the size above it.

    Raises:
        WorkloadError: the model cannot be run.
    """
    probe = Probe(
        device=VirtualGpu(gpu),
        workload=workload,
        accumulation_steps=STEPS,
        headroom=HEADROOM,
        progress=silent,
    )
    started = time.perf_counter()
    found = find_ceiling(probe, LIMIT)
    seconds = time.perf_counter() - started
    below, above = (
        _reserved_bytes(workload, gpu, size) for size in (found.micro_batch, found.micro_batch + 1)
    )
    return Row(
        model=name,
        what=what,
        gpu=gpu.name,
        budget_bytes=probe.budget_bytes,
        ceiling=found.micro_batch,
        executed=tuple(trial.micro_batch for trial in probe.trials),
        ooms=sum(trial.oom for trial in probe.trials),
        method=found.method,
        degree=found.model.degree if found.model is not None else 1,
        reason=found.reason,
        kernels_vary=_differ(probe),
        fits=below <= probe.budget_bytes,
        next_fits=above <= probe.budget_bytes,
        reserved_bytes=(below, above),
        seconds=round(seconds, 2),
    )


def _differ(probe: Probe) -> bool:
    """Whether the smallest and the largest size executed differ in how much they allocate."""
    small, large = (probe.runs[pick(probe.runs)].trace for pick in (min, max))
    return len(small.blocks) != len(large.blocks)


def _reserved_bytes(workload: Workload, gpu: GpuSpec, micro_batch: int) -> int:
    if micro_batch == 0:
        return 0
    run = VirtualGpu(gpu).run(workload, micro_batch=micro_batch, accumulation_steps=STEPS)
    return run.replay.peak_reserved_bytes


HEADER = (
    "| model | GPU | budget | ceiling | executions | OOMs | method | n fits | n + 1 fits "
    "| seconds | |\n|-|-|-|-|-|-|-|-|-|-|-|"
)


def markdown(row: Row) -> str:
    """Render a row of the table below `HEADER`."""
    cells = (
        f"{row.model}: {row.what}" if row.what else row.model,
        row.gpu,
        format_bytes(row.budget_bytes),
        row.ceiling,
        f"{len(row.executed)} ({', '.join(map(str, row.executed))})",
        row.ooms,
        row.method,
        "yes" if row.fits else "NO",
        "YES" if row.next_fits else "no",
        f"{row.seconds:.1f}",
        "ok" if row.passes else "FAILS",
    )
    return f"| {' | '.join(map(str, cells))} |"
