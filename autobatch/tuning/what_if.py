"""Ceilings on other cards and with other headrooms, and peaks, from a plan's own trace model.

Invariant: a ceiling that is returned is the one that `autobatch.tune` finds there; where that
cannot be promised, none is returned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.devices.virtual.questions import Question
from autobatch.devices.virtual.sharing import are_alike
from autobatch.errors import UsageError
from autobatch.gpus.budget import budget_bytes
from autobatch.gpus.catalogue import GpuSpec, by_capacity
from autobatch.memory.alignment import Misaligned
from autobatch.memory.trace_model import TraceModel
from autobatch.records.evidence import MemoryPoint
from autobatch.records.split import Split, split
from autobatch.records.what_if import WhatIf, WhatIfCard
from autobatch.tuning.ceiling import LOOK_ABOVE, Ceiling
from autobatch.tuning.first_sizes import SMALL
from autobatch.tuning.probe import Probe
from autobatch.tuning.search import CeilingSearch

__all__ = ["what_if"]

_PREDICTIONS = 38
"""So many peaks are predicted at most; each takes about one 200th of the time of a tuning."""

_FOR_SPLITS = 6
"""So many of them are kept for micro-batches that other targets are split into."""

_EVERY = tuple(share / 100 for share in range(51))
"""The headrooms that are offered where peaks are known at every micro-batch."""

_SOME = (0.1, 0.05, 0.0, 0.2, 0.15, 0.3)
"""Those that are looked at elsewhere, as long as predictions last."""


def what_if(
    probe: Probe,
    found: Ceiling,
    planned: Split,
    curve: Sequence[MemoryPoint],
    limit: int,
    asked: Collection[Question],
) -> WhatIf | None:
    """Return the ceilings and peaks from which a report answers other questions.

    Args:
        probe: of the plan.
        found: its ceiling.
        planned: its split.
        curve: peaks that are known already.
        limit: the largest micro-batch to consider.
        asked: what the code that ran asked of the card; after "card", runs hold for no other.
    """
    model, spec = found.model, probe.device.spec
    if model is None or not _is_certain(probe, found, model):
        return None
    known = _Known(probe, model, curve)
    known.add_smallest()
    cards = (spec,) if "card" in asked else (spec, *_others(spec))
    for card in cards:
        known.add_all(card.capacity_bytes - card.context_bytes)
    offered = _offered(cards, known, probe.headroom, limit)
    if (probe.headroom, found.micro_batch) not in zip(
        offered[0].headrooms, offered[0].ceilings, strict=True
    ):
        return None
    known.add_splits(planned, found.micro_batch)
    sizes = sorted(known.peaks)
    return WhatIf(
        micro_batches=tuple(sizes),
        peak_reserved_bytes=tuple(known.peaks[size] for size in sizes),
        cards=tuple(card for card in offered if card.headrooms),
    )


def _is_certain(probe: Probe, found: Ceiling, model: TraceModel) -> bool:
    """Whether every other search would follow the same model.

    One that an execution at this ceiling corrected is not the one that is found elsewhere, and
    batches of several shapes reserve more than the windows that are searched with.
    """
    return (
        isinstance(probe.device, VirtualGpu)
        and (len(model.nodes) == 1 or model.nodes == SMALL)
        and probe.accumulation_steps > 1
        and found.stopped is None
        and not probe.workload.stream
    )


def _others(spec: GpuSpec) -> Iterator[GpuSpec]:
    """Yield the other cards of the catalogue that run the same kernels with the same scratch."""
    for card in by_capacity():
        if card.name != spec.name and are_alike(spec, card):
            yield card


def _offered(
    cards: Sequence[GpuSpec], known: _Known, own: float, limit: int
) -> tuple[WhatIfCard, ...]:
    """Return the cards with what is known of their ceilings, the plan's headroom first."""
    found: dict[tuple[str, float], int | None] = {}
    for share in dict.fromkeys((own, *_SOME, *_EVERY)):
        for card in cards:
            usable = card.capacity_bytes - card.context_bytes
            if share in (own, *_SOME) or usable <= known.whole_bytes:
                found[card.name, share] = known.ceiling(budget_bytes(usable, share), limit)
    answered = {key: ceiling for key, ceiling in sorted(found.items()) if ceiling is not None}
    return tuple(
        WhatIfCard(
            name=card.name,
            capacity_bytes=card.capacity_bytes,
            context_bytes=card.context_bytes,
            headrooms=tuple(share for name, share in answered if name == card.name),
            ceilings=tuple(n for (name, _), n in answered.items() if name == card.name),
        )
        for card in cards
    )


class _Known:
    """Peaks by micro-batch, and as many more of them as may be predicted.

    Attributes:
        whole_bytes: of budgets up to this one, all micro-batches are known that may fit.
    """

    def __init__(self, probe: Probe, model: TraceModel, curve: Sequence[MemoryPoint]) -> None:
        self._probe = probe
        self._model = model
        self._left = _PREDICTIONS
        self.whole_bytes = 0
        self.peaks = {point.micro_batch: point.peak_reserved_bytes for point in curve}

    def add_smallest(self) -> None:
        """Predict the peaks of the fewest samples, so that none is below all that are known."""
        for size in (1, *SMALL):
            self._add(size)

    def add_all(self, usable_bytes: int) -> None:
        """Predict every micro-batch up to those that do not fit, if that is few of them."""
        small, large = self._model.nodes[0], max(self.peaks)
        if small == large:
            return
        rise = (self.peaks[large] - self.peaks[small]) / max(large - small, 1)
        if rise <= 0:
            return
        last = small + int((usable_bytes - self.peaks[small]) / rise) + LOOK_ABOVE + 1
        if last - sum(size <= last for size in self.peaks) > self._left - _FOR_SPLITS:
            return
        size = over = 0
        while over <= LOOK_ABOVE + 1:
            size += 1
            if not self._add(size):
                return
            over = over + 1 if self.peaks[size] > usable_bytes else 0
        self.whole_bytes = usable_bytes

    def ceiling(self, budget: int, limit: int) -> int | None:
        """Return the ceiling within a budget; None where it is not known for certain.

        One sample may be allocated in an order of its own, which only an execution tells.
        """
        is_whole = budget <= self.whole_bytes
        found = self._only_ceiling(budget) if is_whole else self._searched(budget, limit)
        return found if found is not None and min(SMALL) <= found < limit else None

    def _only_ceiling(self, budget: int) -> int | None:
        """Return where a search ends that looks a few sizes above, if that is one place only."""
        beyond = range(1, LOOK_ABOVE + 2)
        ends = [
            size
            for size, peak in self.peaks.items()
            if peak <= budget
            and all(self.peaks.get(size + more, budget + 1) > budget for more in beyond)
        ]
        return ends[0] if len(ends) == 1 else None

    def _searched(self, budget: int, limit: int) -> int | None:
        """Return what the search finds, as long as predictions last."""
        search = CeilingSearch(limit=limit, budget_bytes=budget, look_above=LOOK_ABOVE)
        asked: int | None
        for size in self._model.nodes:
            search.tell(size, fits=self.peaks[size] <= budget, peak_bytes=self.peaks[size])
        while (asked := search.ask()) is not None:
            if not self._add(asked, keeping=_FOR_SPLITS):
                return None
            search.tell(asked, fits=self.peaks[asked] <= budget, peak_bytes=self.peaks[asked])
        return search.ceiling

    def add_splits(self, planned: Split, ceiling: int) -> None:
        """Predict micro-batches that targets near the planned one are split into."""
        target, ranks = planned.target, planned.world_size
        for other in (target * 2, target // 2, target * 4, target // 4, target * 8, target // 8):
            with contextlib.suppress(UsageError):  # too few samples for so many GPUs, say
                self._add(split(other, ceiling=ceiling, world_size=ranks).micro_batch)

    def _add(self, micro_batch: int, keeping: int = 0) -> bool:
        """Return whether the peak at a micro-batch is known, predicted if there are any left."""
        if micro_batch not in self.peaks:
            if self._left <= keeping:
                return False
            self._left -= 1
            try:
                foretold = self._probe.predict(self._model, micro_batch)
            except Misaligned:
                return False
            self.peaks[micro_batch] = foretold.peak_reserved_bytes
        return True
