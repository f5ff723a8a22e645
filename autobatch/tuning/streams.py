"""Batches of many shapes, as training has them: what they reserve, and which of them needs most.

The probed windows have the heaviest batch of the user's data only. But blocks that the allocator
keeps of a short batch are too small for a longer one, so that batches of many lengths reserve more
than the longest alone. Here they are run one after the other on a simulated GPU, smallest first,
which reserves most, and then mixed.

Invariant: a user's own maker of batches is asked for every shape as for the probed one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from autobatch.devices.base import MOST_STEPS, Device, Run
from autobatch.errors import WorkloadError
from autobatch.gpus.uncertainty import peak_range
from autobatch.memory.allocator import CachingAllocator
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.replay import simulate
from autobatch.records.footprint import Footprint
from autobatch.support.units import format_bytes
from autobatch.support.wording import one_line
from autobatch.workload.workload import Workload

__all__ = ["Stream", "with_heaviest_batch"]

_NOTABLE = 0.01
"""Shares of what is reserved below which nothing is said of the stream."""


def with_heaviest_batch(workload: Workload, device: Device) -> Workload:
    """Choose between the largest batches of a data set by what they take on a simulated GPU.

    Raises:
        WorkloadError: the user's model, loss or optimizer failed.
    """
    rivals = getattr(workload.batch, "rivals", ())
    if not rivals:
        return workload
    simulator = device.simulated()

    def peak_bytes(batch: Any) -> int:
        run = simulator.run(replace(workload, batch=batch), micro_batch=2, accumulation_steps=1)
        return run.replay.peak_allocated_bytes

    heaviest = max((workload.batch, *rivals), key=peak_bytes)
    if heaviest is workload.batch:
        return workload
    notes = [note for note in workload.notes if note not in workload.batch.notes]  # type: ignore[attr-defined]
    return replace(workload, batch=heaviest, notes=(*notes, *heaviest.notes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What windows of batches of all shapes did on a simulated GPU.

    Attributes:
        run: all of them.
        alone_bytes: reserved by windows of the probed batch alone, on the same simulated GPU.
        shapes: how many there are.
        settings: of the allocator.
        world_size: GPUs that train together.
        why_not: what failed, in one line, where a batch of some shape could not be run.
    """

    run: Run | None
    alone_bytes: int
    shapes: int
    settings: AllocatorSettings
    world_size: int
    why_not: str | None = None

    @classmethod
    def of(cls, workload: Workload, device: Device, footprint: Footprint) -> Stream | None:
        """Run the stream of a workload with the micro-batch and steps of a footprint.

        Returns:
            None where the workload has batches of one shape only.
        """
        if not workload.stream:
            return None
        simulator = device.simulated()
        size, steps = footprint.micro_batch, min(footprint.accumulation_steps, MOST_STEPS)
        alone = footprint.peak_reserved_bytes
        if not device.is_simulated:
            run = simulator.run(workload, micro_batch=size, accumulation_steps=steps)
            alone = run.replay.peak_reserved_bytes
        mixed = list(workload.stream)
        random.Random(0).shuffle(mixed)
        in_turn = (*workload.stream, *mixed)
        told = partial(
            cls,
            alone_bytes=alone,
            shapes=len(workload.stream),
            settings=simulator.allocator().settings,
            world_size=workload.world_size,
        )
        try:
            run = simulator.run(
                replace(workload, batch=_InTurn(in_turn), evaluate=None),
                micro_batch=size,
                accumulation_steps=steps,
                windows=-(-len(in_turn) // steps),
            )
        except WorkloadError as error:
            return told(run=None, why_not=one_line(error))
        return told(run=run)

    @property
    def reserved_bytes(self) -> int:
        """Most bytes that all shapes together make the allocator reserve."""
        return max(self.alone_bytes, self.run.replay.peak_reserved_bytes if self.run else 0)

    def fits(self, budget_bytes: int) -> bool:
        """Whether the stream runs through within a budget, even if the cache has to be released."""
        if self.run is None or self.reserved_bytes <= budget_bytes:
            return True
        allocator = CachingAllocator(self.settings, limit_bytes=budget_bytes)
        return self._replayed(allocator).oom_event is None

    def footprint(self, alone: Footprint, budget_bytes: int | None = None) -> Footprint:
        """Return the account of the heaviest batch, with what the stream reserves beside it."""
        more = self.reserved_bytes - self.alone_bytes
        reserved = alone.peak_reserved_bytes + more
        if budget_bytes is not None:  # beyond it the cache is released
            reserved = max(min(reserved, budget_bytes), alone.peak_reserved_bytes)
        if alone.low_device_bytes is None:
            return replace(alone, peak_reserved_bytes=reserved)
        kind = alone.kind or "convolutions"
        low, high = peak_range(reserved, alone.context_bytes, kind, world_size=self.world_size)
        low = min(low, alone.low_device_bytes)  # another order of batches may reserve less
        return replace(
            alone, peak_reserved_bytes=reserved, low_device_bytes=low, high_device_bytes=high
        )

    def note(self, micro_batch: int, budget_bytes: int | None = None) -> str | None:
        """Say what the shapes reserve and what would save it; None where it is next to nothing."""
        if self.why_not is not None:
            return f"batches of other shapes of the data are not in the account: {self.why_not}"
        reserved = self.reserved_bytes
        if reserved <= (1 + _NOTABLE) * self.alone_bytes:
            return None
        said = (
            f"batches of {self.shapes} shapes from the data, smallest first and then mixed, "
            f"reserve {format_bytes(reserved)} at micro-batch {micro_batch:,}, the heaviest alone "
            f"{format_bytes(self.alone_bytes)} (simulated): blocks of short ones stay reserved and "
            "are too small for longer ones"
        )
        if budget_bytes is not None and reserved > budget_bytes:
            said += (
                f"; the budget is {format_bytes(budget_bytes)}, so the allocator has to release "
                "its cache, which stalls the GPU"
            )
        return said + self.remedy()

    def remedy(self) -> str:
        """Say what expandable segments would reserve; nothing where the allocator has them."""
        if self.settings.expandable_segments or self.run is None:
            return ""
        expandable = replace(self.settings, expandable_segments=True)
        saved = self._replayed(CachingAllocator(expandable)).peak_reserved_bytes
        return (
            "; with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True it would be "
            f"{format_bytes(saved)}"
        )

    def _replayed(self, allocator: CachingAllocator) -> Any:
        assert self.run is not None
        trace = self.run.trace
        return simulate(trace.sizes, trace.events, allocator=allocator, streams=trace.streams)


class _InTurn:
    """Makes micro-batches by several functions, one after the other, again and again."""

    def __init__(self, makers: Sequence[Callable[[int], Any]]):
        self._makers = makers
        self._asked = 0

    def __call__(self, samples: int) -> Any:
        make = self._makers[self._asked % len(self._makers)]
        self._asked += 1
        return make(samples)
