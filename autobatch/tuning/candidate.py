"""A training run that may be what is wanted: its memory, its plan and its time, simulated once.

Invariant: its plan is the one that `tune` makes for the same workload and card.
"""

from __future__ import annotations

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import DoesNotFitError
from autobatch.levers.setup import Setup
from autobatch.plan.plan import Plan
from autobatch.tuning.planning import plan_of, probe_of
from autobatch.tuning.probe import Probe
from autobatch.tuning.speed import window_estimate

__all__ = ["Candidate"]


class Candidate:
    """A setup with a target."""

    def __init__(self, setup: Setup, target: int, headroom: float | None) -> None:
        """Take a setup; nothing runs yet.

        Args:
            setup: the workload and its card.
            target: effective batch: samples per optimizer update over all GPUs.
            headroom: share of the usable memory to leave free, or None for the default.

        Raises:
            UsageError: the target cannot be split over the workload's GPUs.
        """
        self._setup = setup
        self._target = target
        self._device = VirtualGpu(setup.gpu, setup.settings)
        # apart from that of the plan, whose evidence is that of `tune`
        self._probe = self._new_probe(headroom)
        self._headroom = headroom

    @property
    def budget_bytes(self) -> int:
        """What the run may reserve."""
        return self._probe.budget_bytes

    def reserved(self, micro_batch: int) -> int:
        """Return the reserved peak at a micro-batch."""
        return self._probe.run(micro_batch).replay.peak_reserved_bytes

    def fits(self, micro_batch: int) -> bool:
        """Whether a micro-batch fits."""
        return self._probe.fits(micro_batch)

    def plan(self) -> Plan | None:
        """Return the plan; None where not even micro-batch 1 fits."""
        try:
            return plan_of(self._new_probe(self._headroom), target=self._target)
        except DoesNotFitError:
            return None

    def window_seconds(self, plan: Plan) -> float | None:
        """Return the estimated time of one update by a plan."""
        estimate = window_estimate(
            self._setup.workload,
            self._setup.gpu,
            micro_batch=plan.micro_batch,
            accumulation_steps=plan.accumulation_steps,
            settings=self._setup.settings,
        )
        return None if estimate is None else estimate.seconds

    def _new_probe(self, headroom: float | None) -> Probe:
        return probe_of(self._setup.workload, self._device, target=self._target, headroom=headroom)
