"""Simulated cards that share their executions: one run serves all whose kernels are the same.

Settings of the allocator come after a run: its trace is replayed with those of each card.

Cards of one compute capability run the same kernels. What these take beside their results may
depend on the card as well (how many multiprocessors share the work), but a trace keeps kernels
apart from what tensors take, and their rules are asked again for every card.

Invariant: a run of a card is what this card would have run alone. So a run is not shared in which
code asked for the name or the memory of its card, or in which values that are not known decided
something (what is learned of them depends on what ran before), or which tells of its card.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from autobatch.devices.base import WINDOWS, Run
from autobatch.devices.preserve import kernel_switches
from autobatch.devices.virtual.ahead import Task
from autobatch.devices.virtual.gpu import VirtualGpu, identity_of
from autobatch.devices.virtual.kernels.calls import Hashed, on_card
from autobatch.devices.virtual.questions import questions
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.accounting import replay
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.scratch import with_scratch
from autobatch.memory.trace import Bare
from autobatch.workload.workload import Workload

__all__ = ["SharedRuns", "SharingGpu", "are_alike"]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A run, the card and the allocator that it was made for, and its workload, which keeps ids."""

    run: Run
    spec: GpuSpec
    settings: AllocatorSettings
    workload: Workload


class SharedRuns:
    """The executions of cards that share them.

    Attributes:
        executions: how many there were.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._kept: dict[Hashable, _Kept] = {}
        self._recipes: dict[Hashable, dict[Any, Any]] = {}
        self.executions = 0

    def find(self, key: Hashable) -> _Kept | None:
        """Return the run of a key; None where there is none to share."""
        return self._kept.get(key)

    def recipes(self, key: Hashable) -> dict[Any, Any]:
        """Return the cache of output layouts of runs of one kind."""
        return self._recipes.setdefault(key, {})

    def keep(
        self,
        key: Hashable,
        run: Run,
        spec: GpuSpec,
        settings: AllocatorSettings,
        workload: Workload,
    ) -> None:
        """Share a run from now on."""
        self._kept[key] = _Kept(run, spec, settings, workload)


class SharingGpu(VirtualGpu):
    """A simulated card that takes over the runs of others with the same kernels."""

    def __init__(
        self,
        spec: GpuSpec,
        shared: SharedRuns,
        settings: AllocatorSettings | None = None,
        *,
        counts_work: bool = False,
    ) -> None:
        """Simulate a card.

        Args:
            spec: the card.
            shared: where runs are looked for, and kept.
            settings: as of `VirtualGpu`.
            counts_work: as of `VirtualGpu`.
        """
        super().__init__(spec, settings, counts_work=counts_work)
        self._shared = shared

    def run(
        self,
        workload: Workload,
        *,
        micro_batch: int,
        accumulation_steps: int,
        windows: int = WINDOWS,
    ) -> Run:
        """Run training windows, or take over such a run.

        Raises:
            WorkloadError: the user's model, loss or optimizer failed; the cause is chained.
        """
        key = self._shared_key(workload, micro_batch, accumulation_steps, windows)
        kept = self._shared.find(key)
        if kept is not None:
            return self._taken_over(kept)
        self._shared.executions += 1
        with questions() as asked:
            ran = super().run(
                workload,
                micro_batch=micro_batch,
                accumulation_steps=accumulation_steps,
                windows=windows,
            )
        guesses = self._guesses_of(workload)
        tells_of_card = any(self.spec.name in note for note in ran.notes)
        if "card" not in asked and guesses.is_unused and not tells_of_card:
            self._shared.keep(key, ran, self.spec, self._settings, workload)
        return ran

    def foreseen(
        self, workload: Workload, micro_batches: Iterable[int], accumulation_steps: int
    ) -> list[Task]:
        """Return tasks for helpers: runs that are likely to be asked for, and that none shares."""
        new = [
            size
            for size in micro_batches
            if not self._shared.find(self._shared_key(workload, size, accumulation_steps, WINDOWS))
        ]
        return super().foreseen(workload, new, accumulation_steps)

    def _recipes(self) -> dict[Any, Any]:
        """Return the cache of output layouts of all that runs on such a card, in such a process."""
        return self._shared.recipes((Hashed(self.spec), kernel_switches()))

    def _shared_key(
        self, workload: Workload, micro_batch: int, accumulation_steps: int, windows: int
    ) -> Hashable:
        """Return what is the same for runs that one execution serves."""
        return (
            self.spec.compute_capability,
            identity_of(workload),
            (micro_batch, accumulation_steps, windows),
            (self._counts_work, kernel_switches()),
        )

    def _taken_over(self, kept: _Kept) -> Run:
        """Return a run as it is on this card."""
        trace, bare = kept.run.trace, kept.run.trace.bare
        if bare is not None and not are_alike(kept.spec, self.spec):
            gpu = Hashed(self.spec)
            kernels = tuple(on_card(kernel, gpu) for kernel in bare.kernels)
            trace = with_scratch(Bare(bare.trace, kernels))
        elif kept.settings == self._settings:
            return kept.run
        return replace(kept.run, trace=trace, replay=replay(trace, self.allocator()))


def are_alike(one: GpuSpec, other: GpuSpec) -> bool:
    """Whether two cards differ only in name, memory, bandwidth and sources, which no rule reads."""
    return other == replace(
        one,
        name=other.name,
        capacity_bytes=other.capacity_bytes,
        context_bytes=other.context_bytes,
        bandwidth_bytes_per_s=other.bandwidth_bytes_per_s,
        sources=other.sources,
    )
