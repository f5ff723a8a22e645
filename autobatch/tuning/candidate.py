"""A training run that may be what is wanted: its memory, its plan and its time.

No window is executed twice, not by several candidates either that differ in their allocators alone.

Invariant: its plan is the one that `tune` makes for the same workload and card.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from autobatch.devices.virtual.ahead import Task
from autobatch.devices.virtual.sharing import SharedRuns, SharingGpu
from autobatch.errors import DoesNotFitError
from autobatch.gpus.roofline import can_estimate
from autobatch.levers.setup import Setup
from autobatch.memory.alignment import Misaligned
from autobatch.memory.lasting import lasting_bytes
from autobatch.memory.trace_model import TraceModel
from autobatch.plan.plan import Plan
from autobatch.tuning.first_sizes import first_size
from autobatch.tuning.planning import plan_of, probe_of
from autobatch.tuning.probe import Probe
from autobatch.tuning.speed import SpeedModel

__all__ = ["Candidate"]


class Candidate:
    """A setup with a target."""

    def __init__(
        self, setup: Setup, target: int, headroom: float | None, shared: SharedRuns | None = None
    ) -> None:
        """Take a setup; nothing runs yet.

        Args:
            setup: the workload and its card.
            target: effective batch: samples per optimizer update over all GPUs.
            headroom: share of the usable memory to leave free, or None for the default.
            shared: executions of candidates that may be alike; None shares none.

        Raises:
            UsageError: the target cannot be split over the workload's GPUs.
        """
        self._setup = setup
        self._target = target
        self._headroom = headroom
        counts_work = can_estimate(setup.gpu)
        runs = SharedRuns() if shared is None else shared
        self._device = SharingGpu(setup.gpu, runs, setup.settings, counts_work=counts_work)
        # apart from that of the plan, whose evidence is that of `tune`
        self._probe = self._new_probe()
        self._planned: Probe | None = None

    @property
    def budget_bytes(self) -> int:
        """What the run may reserve."""
        return self._probe.budget_bytes

    def fits(self, micro_batch: int) -> bool:
        """Whether a micro-batch fits."""
        with self._setup.in_force():
            return self._probe.fits(micro_batch)

    def foreseen(self, micro_batch: int | None = None) -> list[Task]:
        """Return what helpers may execute: a size, or where the search for the ceiling begins."""
        with self._setup.in_force():
            size = first_size(self._setup.workload) if micro_batch is None else micro_batch
            tasks = self._probe.foreseen(size)
        return [(key, partial(self._run_in_force, run)) for key, run in tasks]

    def _run_in_force(self, run: Callable[[], Any]) -> Any:
        with self._setup.in_force():
            return run()

    def plan(self) -> Plan | None:
        """Return the plan; None where not even micro-batch 1 fits."""
        self._planned = self._new_probe()
        try:
            with self._setup.in_force():
                return plan_of(self._planned, target=self._target, is_drawn=False)
        except DoesNotFitError:
            return None

    def reserved(self, micro_batch: int) -> int:
        """Return the reserved peak at a micro-batch, by the plan's trace model where that is."""
        if self._planned is not None and micro_batch not in self._probe.runs:
            runs = {n: run for n, run in self._planned.runs.items() if run.shortage is None}
            if micro_batch in runs:
                return runs[micro_batch].replay.peak_reserved_bytes
            # of more runs, some corrected a model, which is not that of the plan any more
            with suppress(Misaligned):
                if len(runs) in (2, 3):
                    model = TraceModel.fit([run.trace for _, run in sorted(runs.items())])
                    return self._planned.predict(model, micro_batch).peak_reserved_bytes
        with self._setup.in_force():
            return self._probe.run(micro_batch).replay.peak_reserved_bytes

    def lasting_bytes(self) -> int | None:
        """Return what the run holds from update to update; None before anything was executed."""
        probes = (self._probe, self._planned)
        runs = [run for probe in probes if probe is not None for run in probe.runs.values()]
        return lasting_bytes(runs[0].trace) if runs else None

    def window_seconds(self, plan: Plan) -> float | None:
        """Return the estimated time of one update by the plan."""
        setup = self._setup
        runs = self._probe.runs | ({} if self._planned is None else self._planned.runs)
        speed = SpeedModel.of_runs(setup.workload, setup.gpu, runs, setup.settings)
        with self._setup.in_force():
            return speed.seconds(plan.micro_batch, plan.accumulation_steps)

    def _new_probe(self) -> Probe:
        return probe_of(
            self._setup.workload, self._device, target=self._target, headroom=self._headroom
        )
