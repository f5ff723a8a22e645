"""`compare`: the same training on several cards, simulated: what fits, how fast, at which cost.

Invariant: every ceiling is the one that `tune` finds for that card.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from autobatch.choosing.cards import distinct_cards, prices_of
from autobatch.choosing.comparison import Comparison
from autobatch.choosing.outcomes import (
    Told,
    first_error,
    outcome_of,
    shared_warnings,
    window_of,
)
from autobatch.devices.preserve import answering
from autobatch.devices.virtual.ahead import Task, run_ahead
from autobatch.devices.virtual.questions import questions
from autobatch.devices.virtual.sharing import SharedRuns, SharingGpu
from autobatch.errors import AutobatchError, UsageError, WorkloadError
from autobatch.gpus.catalogue import GpuSpec, by_capacity
from autobatch.gpus.roofline import can_estimate
from autobatch.memory.lasting import lasting_bytes
from autobatch.plan.plan import Plan
from autobatch.records.comparison import ComparedCard, Outcome, WindowTime
from autobatch.records.plan_record import Objective
from autobatch.records.progress import ProgressCallback, silent
from autobatch.support.wording import one_line
from autobatch.tuning.first_sizes import first_size
from autobatch.tuning.objective import require_objective
from autobatch.tuning.planning import probe_of
from autobatch.tuning.probe import Probe
from autobatch.tuning.stamp import created_now, versions
from autobatch.tuning.workloads import checked_target, stated, workload_of
from autobatch.workload.complete import Asked, WorkloadOptions, require_options
from autobatch.workload.workload import Workload

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["compare"]


@answering()
def compare(
    model: nn.Module | Workload | Callable[[], nn.Module | Workload],
    *,
    target: int,
    gpus: Iterable[str | GpuSpec],
    prices: Mapping[str, float] | None = None,
    objective: Objective = "largest",
    headroom: float | None = None,
    progress: ProgressCallback = silent,
    **options: Unpack[WorkloadOptions],
) -> Comparison:
    """Say for each of several cards what fits, how fast it is and what it costs; all simulated.

    Cards of one compute capability share what is executed, unless the code asks for the name or the
    memory of its card.

    Args:
        model: as in `tune`.
        target: effective batch: samples per optimizer update over all GPUs.
        gpus: catalogue names, sizes such as "24GiB", or GpuSpecs.
        prices: of one card for an hour, by its name, in any one currency; for some or all cards.
        objective: which of the micro-batches that fit is planned, as in `tune`; the largest on
            cards whose speed is not known, with a note, where that of others is.
        headroom: share of the usable memory to leave free, in [0, 1); None leaves what
            `autobatch.gpus.uncertainty` asks for.
        progress: told of each step.
        **options: how the model trains, as `tune` takes it: sample, batch_dims, loss, optimizer,
            autocast, clip_norm, world_size and sharding.

    Returns:
        The comparison; `print` shows it as a table. Seconds and costs are estimates. A card that is
        too small tells by how much; one on which the code fails tells why.

    Raises:
        UsageError: an argument cannot be understood; the subclass says which kind.
        WorkloadError: the model, loss or optimizer failed on every card.

    >>> compared = compare(nn.Linear(64, 8), target=32, gpus=["t4", "l4"], prices={"l4": 0.7})
    >>> [card.outcome.micro_batch for card in compared.cards]
    [32, 32]
    >>> compared.cheapest.gpu.name
    'l4'
    """
    started = time.perf_counter()
    cards = distinct_cards(gpus)
    priced = prices_of(prices or {}, cards)
    require_options(compare, options)
    asked = Asked(model=model, **stated(options))
    target = checked_target(target, asked.world_size, headroom)
    require_objective(objective)
    told = Told(progress, len(cards))
    search = _Search(_Builder(asked), target, objective, headroom, told)
    return replace(search.comparison(cards, priced), seconds=time.perf_counter() - started)


class _Builder:
    """Builds the workload, once for all cards that the code does not tell apart."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._built: dict[Hashable, Workload] = {}

    def on(self, gpu: GpuSpec) -> Workload:
        """Return the workload as it is built where a card is found.

        Raises:
            UsageError: an argument cannot be understood; the subclass says which kind.
            WorkloadError: the function that builds it failed.
        """
        for known in ("anywhere", gpu.compute_capability, gpu.name):
            if known in self._built:
                return self._built[known]
        with questions() as asked:
            workload = workload_of(self._asked, gpu)
        key: Hashable = "anywhere"
        if asked:
            key = gpu.name if "card" in asked else gpu.compute_capability
        self._built[key] = workload
        return workload


class _Search:
    """Finds what each card can do."""

    def __init__(
        self,
        builder: _Builder,
        target: int,
        objective: Objective,
        headroom: float | None,
        told: Told,
    ) -> None:
        self._builder = builder
        self._target = target
        self._objective: Objective = objective
        self._headroom = headroom
        self._told = told
        self._shared = SharedRuns()
        self._probes: dict[str, Probe] = {}
        self._knows_speeds = True
        self._warnings: list[str] = []
        self._notes: list[str] = []

    def comparison(self, cards: Sequence[GpuSpec], prices: Mapping[str, float]) -> Comparison:
        """Go through the cards, and put the answer together.

        Raises:
            UsageError: as `_Builder.on`, on every card.
            WorkloadError: the workload failed on every card.
        """
        plans: dict[str, Plan] = {}
        outcomes: dict[str, Outcome] = {}
        errors: list[AutobatchError] = []
        self._knows_speeds = any(map(can_estimate, cards))
        run_ahead(self._foreseen(cards))
        for gpu in cards:
            self._told.begin(gpu.name)
            try:
                plan, outcome = self._found(gpu)
            except (UsageError, WorkloadError) as error:
                errors.append(error)
                outcome = Outcome(failure=str(error))
            else:
                if plan is not None:
                    plans[gpu.name] = plan
            outcomes[gpu.name] = outcome
        first_error(errors, of=len(cards))
        windows = self._windows(plans)
        workload = next(iter(self._probes.values())).workload
        return Comparison(
            model=type(workload.model).__name__,
            parameters=sum(parameter.numel() for parameter in workload.model.parameters()),
            target=self._target,
            world_size=workload.world_size,
            sharding=workload.shares,
            headroom=next(iter(self._probes.values())).headroom,
            cards=tuple(
                ComparedCard.of(
                    gpu,
                    replace(outcomes[gpu.name], window=windows.get(gpu.name)),
                    prices.get(gpu.name),
                    target=self._target,
                    world_size=workload.world_size,
                )
                for gpu in cards
            ),
            smallest_card=self._smallest_card(outcomes),
            executions=self._shared.executions,
            warnings=(
                *shared_warnings({name: plan.warnings for name, plan in plans.items()}),
                *self._warnings,
            ),
            notes=(
                *shared_warnings({name: plan.notes for name, plan in plans.items()}),
                *self._notes,
            ),
            versions=versions(),
            created=created_now(),
            seconds=0.0,
            plans=plans,
        )

    def _found(self, gpu: GpuSpec) -> tuple[Plan | None, Outcome]:
        """Return the plan of a card; the largest where its speed, which decides it, is not known.

        Raises:
            UsageError: as `outcome_of`; the speed of none of the cards is known.
            WorkloadError: as `outcome_of`.
        """
        probe, is_timed = self._probe(gpu), can_estimate(gpu) or not self._knows_speeds
        if self._objective == "largest" or is_timed:
            return outcome_of(probe, self._target, self._objective)
        plan, outcome = outcome_of(probe, self._target)
        if plan is not None:
            self._notes.append(
                f"no plan by time for {gpu.name}: its speed is not known, so that the largest "
                "micro-batch is planned"
            )
        return plan, outcome

    def _foreseen(self, cards: Sequence[GpuSpec]) -> Iterator[Task]:
        """Yield tasks for helpers: what is executed first for each kind of card."""
        kinds = {gpu.compute_capability: gpu for gpu in reversed(cards)}
        for gpu in cards:
            if gpu is kinds[gpu.compute_capability]:
                with suppress(AutobatchError):  # it is told when its turn comes
                    probe = self._probe(gpu)
                    yield from probe.foreseen(first_size(probe.workload))

    def _probe(self, gpu: GpuSpec) -> Probe:
        probe = probe_of(
            self._builder.on(gpu),
            SharingGpu(gpu, self._shared, counts_work=True),
            target=self._target,
            headroom=self._headroom,
            progress=self._told,
        )
        self._probes[gpu.name] = probe
        return probe

    def _windows(self, plans: Mapping[str, Plan]) -> dict[str, WindowTime]:
        """Estimate the windows of the plans, from the work of the runs that found them."""
        found: dict[str, WindowTime] = {}
        for name, plan in plans.items():
            try:
                window = window_of(self._probes[name], plan)
            except WorkloadError as error:
                self._warnings.append(
                    f"{name}: the time of a window could not be estimated ({one_line(error)})"
                )
                continue
            if window is not None:
                found[name] = window
        return found

    def _smallest_card(self, outcomes: Mapping[str, Outcome]) -> str | None:
        """Return the smallest card of the catalogue on which the smallest micro-batch fits."""
        short = {name: each for name, each in outcomes.items() if each.short_bytes is not None}
        if not short:
            return None
        lasting = min(
            lasting_bytes(self._probes[name].runs[each.tried_micro_batch or 1].trace)
            for name, each in short.items()
        )
        tried = max(each.tried_micro_batch or 1 for each in short.values())
        for gpu in by_capacity():
            known = outcomes.get(gpu.name)
            if known is not None and known.fits:
                return gpu.name
            if known is not None or gpu.capacity_bytes - gpu.context_bytes < lasting:
                continue
            self._told.begin(gpu.name)
            try:
                if self._probe(gpu).fits(tried):
                    return gpu.name
            except AutobatchError:  # the code fails there
                continue
        return None
