"""Where the configurations of a sweep run: on a simulated card, or on the one in the machine.

Invariant: a configuration fits as it does for `tune`: two windows stay within the budget, and so do
batches of all shapes that the data has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

from autobatch.choosing.space import Configuration
from autobatch.devices.base import MOST_STEPS, Device, Run
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import UsageError
from autobatch.gpus.budget import budget_bytes
from autobatch.gpus.roofline import can_estimate, estimate
from autobatch.levers.setup import Setup
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.plan.plan import Plan
from autobatch.records.footprint import Evidence
from autobatch.support.units import format_bytes
from autobatch.support.wording import for_reader
from autobatch.tuning.objective import TIMED_STEPS
from autobatch.tuning.planning import footprint_on, plan_of, probe_of
from autobatch.tuning.streams import Stream
from autobatch.workload.workload import Workload

__all__ = ["Bench", "GpuBench", "SimulatedBench", "Tried", "bench_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What a configuration did.

    Attributes:
        fits: whether it stays within the budget.
        reserved_bytes: most that the allocator held, as far as it came.
        seconds: of a training window; None where it does not fit.
        reason: why it does not fit; None where it does.
        executions: runs of two windows on the card.
        simulations: runs on a simulated card before those on a real one.
    """

    fits: bool
    reserved_bytes: int
    seconds: float | None
    reason: str | None = None
    executions: int = 1
    simulations: int = 0


class Bench(Protocol):
    """Runs configurations on one card.

    Attributes:
        device: the card.
        memory: how reserved bytes are known.
        time: how seconds are known.
        margin: by which share a smaller micro-batch may be faster than a larger one, at most.
        keeps_settings: whether the allocator's settings are those of the process.
    """

    device: Device
    memory: Evidence
    time: Literal["measured", "estimate"]
    margin: float
    keeps_settings: bool

    @property
    def budget_bytes(self) -> int:
        """What a run may reserve."""
        ...

    def run(self, configuration: Configuration) -> Tried:
        """Run a configuration.

        Raises:
            WorkloadError: the user's model, loss or optimizer failed.
        """
        ...

    def plan(self, configuration: Configuration) -> Plan:
        """Return the plan of a configuration."""
        ...


class SimulatedBench:
    """Runs configurations on a simulated card, once each: memory and work are counted together."""

    memory: Evidence = "simulated"
    time: Literal["measured", "estimate"] = "estimate"
    margin = 0.02  # tiles of products fill a card a little better at some sizes than at others
    keeps_settings = False

    def __init__(self, device: VirtualGpu, target: int, headroom: float | None) -> None:
        """Take a card and the share of its usable memory to leave free.

        Raises:
            UsageError: its speed is not known.
        """
        if not can_estimate(device.spec):
            raise UsageError(
                f"the speed of {device.spec.name} is not known, so that nothing can be called "
                "faster: name a card that `autobatch gpus` lists with GB/s and TFLOP/s, such as "
                + for_reader("gpu='a100-40gb'", "--gpu a100-40gb")
            )
        self.device: Device = device
        self._target = target
        self._headroom = device.default_headroom if headroom is None else headroom
        # a card for each setting of the allocator; each remembers the layouts that it has seen
        self._cards: list[tuple[AllocatorSettings, VirtualGpu]] = []

    @property
    def budget_bytes(self) -> int:
        """What a run may reserve."""
        return budget_bytes(self.device.usable_bytes, self._headroom)

    def run(self, configuration: Configuration) -> Tried:
        """Run two windows with their work counted."""
        setup, steps = configuration.setup, configuration.split.accumulation_steps
        card = self._card(setup)
        with setup.in_force():
            run = card.run(
                setup.workload,
                micro_batch=configuration.micro_batch,
                accumulation_steps=min(steps, MOST_STEPS),
            )
        fits, reserved, reason = _judged(run, setup.workload, card, self.budget_bytes)
        if not fits:
            return Tried(fits=False, reserved_bytes=reserved, seconds=None, reason=reason)
        assert run.work is not None
        found = estimate(
            run.work,
            setup.gpu,
            accumulation_steps=steps,
            world_size=setup.workload.world_size,
        )
        if found is None:
            raise UsageError(
                f"the speed of {setup.gpu.name} is not known in a precision that this run needs"
            )
        return Tried(fits=True, reserved_bytes=reserved, seconds=found.seconds)

    def plan(self, configuration: Configuration) -> Plan:
        """Return the plan of a configuration on a card of its settings."""
        setup = configuration.setup
        device = VirtualGpu(setup.gpu, setup.settings)
        return _plan(configuration, device, self._target, self._headroom)

    def _card(self, setup: Setup) -> VirtualGpu:
        for settings, card in self._cards:
            if settings == setup.settings:
                return card
        card = VirtualGpu(setup.gpu, setup.settings, counts_work=True)
        self._cards.append((setup.settings, card))
        return card


class GpuBench:
    """Runs configurations on the card in the machine: simulated first, measured if they fit."""

    memory: Evidence = "measured"
    time: Literal["measured", "estimate"] = "measured"
    margin = 0.1  # kernels are chosen by size, and times of windows scatter
    keeps_settings = True

    def __init__(self, device: Device, target: int, headroom: float | None) -> None:
        """Take a card and the share of its usable memory to leave free."""
        self.device = device
        self._simulated = device.simulated()
        self._target = target
        self._headroom = device.default_headroom if headroom is None else headroom

    @property
    def budget_bytes(self) -> int:
        """What a run may reserve; it falls while the context of the process grows."""
        return budget_bytes(self.device.usable_bytes, self._headroom)

    def run(self, configuration: Configuration) -> Tried:
        """Run windows on the card, unless the simulation says that they do not fit.

        Raises:
            UsageError: a lever of the user's own changes the allocator, which runs already.
            WorkloadError: the user's model, loss or optimizer failed.
        """
        if configuration.setup.settings != AllocatorSettings.of_environment():
            raise UsageError(
                "a process cannot change the allocator's settings once it uses the card: set "
                "PYTORCH_CUDA_ALLOC_CONF before it starts"
            )
        with configuration.setup.in_force():
            return self._run(configuration)

    def _run(self, configuration: Configuration) -> Tried:
        workload, size = configuration.setup.workload, configuration.micro_batch
        steps = configuration.split.accumulation_steps
        foreseen = self._simulated.run(
            workload, micro_batch=size, accumulation_steps=min(steps, MOST_STEPS)
        )
        fits, reserved, reason = _judged(foreseen, workload, self._simulated, self.budget_bytes)
        if not fits:
            return Tried(
                fits=False,
                reserved_bytes=reserved,
                seconds=None,
                reason=f"{reason} by the simulation; it was not run on the card",
                executions=0,
                simulations=1,
            )
        timed = min(steps, TIMED_STEPS)
        with self.device.hosting(workload):
            run = self.device.run(workload, micro_batch=size, accumulation_steps=timed)
        fits, reserved, reason = _judged(run, workload, self.device, self.budget_bytes)
        seconds = None
        if fits:
            assert run.window_seconds is not None
            seconds = run.window_seconds * steps / timed
        return Tried(
            fits=fits, reserved_bytes=reserved, seconds=seconds, reason=reason, simulations=1
        )

    def plan(self, configuration: Configuration) -> Plan:
        """Return the plan of a configuration on the card."""
        return _plan(configuration, self.device, self._target, self._headroom)


def bench_of(device: Device, target: int, headroom: float | None) -> Bench:
    """Return the bench of a device.

    Raises:
        UsageError: it is a simulated card whose speed is not known.
    """
    if isinstance(device, VirtualGpu):
        return SimulatedBench(device, target, headroom)
    return GpuBench(device, target, headroom)


def _judged(
    run: Run, workload: Workload, device: Device, budget: int
) -> tuple[bool, int, str | None]:
    """Say whether a run fits, what it reserved, and why it does not fit."""
    reserved = run.replay.peak_reserved_bytes
    if run.shortage is not None:
        return False, reserved, f"it runs out of memory ({run.shortage})"
    fits = run.fits(budget)
    if fits and workload.stream:
        footprint = footprint_on(device, workload, run.trace, run.replay)
        stream = Stream.of(workload, device, footprint)
        if stream is not None:
            fits = stream.fits(budget)
            reserved = stream.footprint(footprint, budget).peak_reserved_bytes
    if fits:
        return True, reserved, None
    return False, reserved, f"it needs {format_bytes(reserved)} of {format_bytes(budget)}"


def _plan(configuration: Configuration, device: Device, target: int, headroom: float) -> Plan:
    """Return the plan with the micro-batch of a configuration, which may not be the largest."""
    workload = configuration.setup.workload

    def planned(workload: Workload) -> Plan:
        return plan_of(probe_of(workload, device, target=target, headroom=headroom), target=target)

    with configuration.setup.in_force():
        plan = planned(workload)
        if plan.micro_batch <= configuration.micro_batch:
            return plan
        return planned(replace(workload, sample_limit=configuration.micro_batch))
