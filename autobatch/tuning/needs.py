"""What would let a run fit without a lever: a larger card, more cards, or a smaller size.

Invariant: each was simulated, and fits with one sample.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

from torch import nn

from autobatch.devices.virtual.ahead import run_ahead
from autobatch.errors import AutobatchError
from autobatch.gpus.catalogue import by_capacity
from autobatch.levers.setup import Setup
from autobatch.plan.advice import Need
from autobatch.support.wording import one_line
from autobatch.tuning.candidate import Candidate
from autobatch.tuning.workloads import workload_of
from autobatch.workload.complete import Asked
from autobatch.workload.workload import Workload

__all__ = ["Needs", "Resized"]

Resized = Callable[[int], nn.Module | Workload]

_MOST_RANKS = 64
"""GPUs that a run is tried to be shared over."""

_PARTS = 16
"""The largest size that fits is found to such a part of the present one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Looks for what would do where a run does not fit.

    Attributes:
        setup: the run as it is.
        asked: what it was made of.
        target: effective batch.
        reserved_bytes: what it reserves with one sample.
        lasting_bytes: what it holds from update to update.
        candidate: takes a setup that may fit.
        tell: is told what is tried.
        note: is told what could not be.
    """

    setup: Setup
    asked: Asked
    target: int
    reserved_bytes: int
    lasting_bytes: int
    candidate: Callable[[Setup], Candidate]
    tell: Callable[[str], None]
    note: Callable[[str], None]

    def found(self, resized: tuple[str, int, Resized] | None) -> Iterator[Need]:
        """Yield what fits; `resized` is that of `advise`."""
        run_ahead(task for ranks in self._shared_over() for task in self._over(ranks).foreseen(1))
        for tell in (self._larger_card, self._more_cards):
            if (need := tell()) is not None:
                yield need
        if resized is not None and (need := self._smaller(*resized)) is not None:
            yield need

    def _larger_card(self) -> Need | None:
        """Return the smallest card of the catalogue on which the run fits."""
        for card in by_capacity():
            usable = card.capacity_bytes - card.context_bytes
            is_larger = card.capacity_bytes > self.setup.gpu.capacity_bytes
            # kernels of another card take other scratch memory, never half of the whole
            if is_larger and usable > self.reserved_bytes / 2:
                candidate = self.candidate(replace(self.setup, gpu=card))
                if candidate.budget_bytes < self.lasting_bytes:
                    continue
                self.tell(f"a larger card, {card.name}")
                if candidate.fits(1):
                    return Need(
                        what="a larger card",
                        value=card.name,
                        reserved_bytes=candidate.reserved(1),
                    )
        return None

    def _more_cards(self) -> Need | None:
        """Return how many cards share the run by FSDP2 where it fits."""
        for ranks in self._shared_over():
            self.tell(f"{ranks} cards with FSDP2")
            candidate = self._over(ranks)
            try:
                if candidate.fits(1):
                    reserved = candidate.reserved(1)
                    value = f"{ranks} of {self.setup.gpu.name}"
                    return Need(what="cards with FSDP2", value=value, reserved_bytes=reserved)
            except AutobatchError as error:
                self.note(f"sharing by FSDP2 was not tried: {one_line(error)}")
                return None
        return None

    def _shared_over(self) -> Iterator[int]:
        """Yield how many GPUs the run may be shared over by FSDP2, the fewest first."""
        ranks = max(2, 2 * self.setup.workload.world_size)
        while not self.setup.workload.is_sharded and ranks <= min(self.target, _MOST_RANKS):
            yield ranks
            ranks *= 2

    def _over(self, ranks: int) -> Candidate:
        return self.candidate(self.setup.having(world_size=ranks, sharding="fsdp"))

    def _smaller(self, name: str, size: int, resized: Resized) -> Need | None:
        """Return the largest size below the present one that fits, in whole steps."""
        step = max(size // _PARTS, 1)

        @cache
        def of_steps(steps: int) -> Candidate:
            self.tell(f"{name} of {steps * step:,}")
            asked = replace(self.asked, model=partial(resized, steps * step))
            other = workload_of(asked, self.setup.gpu)
            return self.candidate(replace(self.setup, workload=other))

        if not of_steps(1).fits(1):
            return None
        smaller = range(1, -(-size // step))
        fitting = bisect_left(smaller, True, key=lambda steps: not of_steps(steps).fits(1))
        if not fitting:
            return None
        reserved = of_steps(fitting).reserved(1)
        return Need(what=f"{name} of at most", value=f"{fitting * step:,}", reserved_bytes=reserved)
