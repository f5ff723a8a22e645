"""Find the largest micro-batch that fits with about three executions.

Two small traces give a trace model; the allocator simulation over it gives a ceiling; an execution
at that ceiling confirms the model, or corrects it. Where traces do not align, sizes are executed
one by one. Invariant: a ceiling that is returned was executed and fits (or the window that will
run was, where that needs no accumulation); the next size was executed, or predicted not to fit by
a model that had just been confirmed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autobatch.accounts import replay
from autobatch.devices.base import Device, Run
from autobatch.errors import WorkloadError
from autobatch.plan import Trial
from autobatch.progress import Progress, ProgressCallback
from autobatch.replay import Replay, simulate
from autobatch.search import CeilingSearch
from autobatch.trace import Trace
from autobatch.tracemodel import Misaligned, TraceModel
from autobatch.workload import Workload

__all__ = ["Ceiling", "Probe", "find_ceiling"]

_SMALL = (2, 3)
"""The first two sizes: at 1 the order of events often differs (squeezed dimensions)."""

_EXPECTED = 3


@dataclass(slots=True)
class Probe:
    """Executes a workload at sizes, and keeps the evidence.

    Attributes:
        trials: every execution, in order.
        runs: what each execution gave, by micro-batch.
    """

    device: Device
    workload: Workload
    accumulation_steps: int
    budget_bytes: int
    progress: ProgressCallback
    trials: list[Trial] = field(default_factory=list)
    runs: dict[int, Run] = field(default_factory=dict)
    replays: dict[int, Replay] = field(default_factory=dict)

    def trace(self, micro_batch: int) -> Trace:
        """Execute a size, once, and return its trace."""
        if micro_batch not in self.runs:
            self.execute(micro_batch, self.accumulation_steps)
        return self.runs[micro_batch].trace

    def execute(self, micro_batch: int, accumulation_steps: int) -> tuple[Run, Replay]:
        """Run two windows and log the trial; runs of the probed window are remembered."""
        done = len(self.trials)
        self.progress(
            Progress(
                step="simulating two training windows",
                executions=done,
                expected=max(_EXPECTED, done + 1),
                micro_batch=micro_batch,
            )
        )
        run = self.device.run(
            self.workload, micro_batch=micro_batch, accumulation_steps=accumulation_steps
        )
        replayed = replay(run.trace)
        self.trials.append(
            Trial(
                micro_batch=micro_batch,
                accumulation_steps=accumulation_steps,
                fits=replayed.peak_reserved_bytes <= self.budget_bytes,
                oom=False,
                alloc_retries=replayed.alloc_retries,
                peak_allocated_bytes=replayed.peak_allocated_bytes,
                peak_reserved_bytes=replayed.peak_reserved_bytes,
                seconds=run.seconds,
                evidence=self.device.evidence,
            )
        )
        if accumulation_steps == self.accumulation_steps:
            self.runs[micro_batch] = run
            self.replays[micro_batch] = replayed
        return run, replayed

    def fits(self, micro_batch: int) -> bool:
        """Execute a size and tell whether it stays within the budget."""
        self.trace(micro_batch)
        return self.replays[micro_batch].peak_reserved_bytes <= self.budget_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The answer of the search.

    Attributes:
        micro_batch: largest size that fits; 0 when not even one sample does.
        limit_reached: the search stopped at its limit, and the true ceiling may be higher.
        model: reproduces the executed traces; None where they do not align.
        reason: why there is no model; None where there is one.
        whole: the executed window without accumulation, where that is what will run.
        predicted: what the model foretold at the sizes that the search looked at.
    """

    micro_batch: int
    limit_reached: bool
    model: TraceModel | None
    reason: str | None = None
    whole: tuple[Trace, Replay] | None = None
    predicted: Mapping[int, Replay] = field(default_factory=dict)


def find_ceiling(probe: Probe, limit: int, wanted: int | None = None) -> Ceiling:
    """Find the largest micro-batch in [1, limit] whose windows stay within the budget.

    Args:
        probe: executes the workload with its accumulation steps.
        limit: largest size to consider.
        wanted: samples of one update on one GPU. Where the ceiling allows them all at once, a
            window of one such micro-batch is executed in place of one at the ceiling: it is what
            will run, and its beginning checks the model as well.
    """
    first, second = (min(size, limit) for size in _SMALL)
    if first == second:
        return _by_execution(probe, limit, reason="only sizes up to 2 are possible")
    try:
        model = TraceModel.fit([probe.trace(first), probe.trace(second)])
        return _by_model(probe, limit, wanted, model)
    except Misaligned as error:
        return _by_execution(probe, limit, reason=str(error))


def _by_model(probe: Probe, limit: int, wanted: int | None, model: TraceModel) -> Ceiling:
    """Follow the model to a ceiling, and refit it once where an execution disagrees.

    Raises:
        Misaligned: the executions follow no quadratic in the micro-batch.
    """
    while True:
        search, predicted = _search_model(model, probe, limit)
        if wanted is not None and max(_SMALL) < wanted <= search.ceiling:
            run, replayed = probe.execute(wanted, 1)
            wanted = None
            if model.foretells_start_of(run.trace) and probe.trials[-1].fits:
                return Ceiling(
                    micro_batch=search.ceiling,
                    limit_reached=search.limit_reached,
                    model=model,
                    whole=(run.trace, replayed),
                    predicted=predicted,
                )
        size = _checkpoint(search.ceiling, limit, probe)
        if size == 1:  # one sample may be allocated in an order of its own
            return _small_ceiling(probe, model)
        difference = model.difference(probe.trace(size))
        if difference is None:
            return Ceiling(
                micro_batch=search.ceiling,
                limit_reached=search.limit_reached,
                model=model,
                predicted=predicted,
            )
        if len(model.nodes) == 3:
            raise Misaligned(difference)
        model = TraceModel.fit([probe.trace(n) for n in (*model.nodes, size)])


def _search_model(
    model: TraceModel, probe: Probe, limit: int
) -> tuple[CeilingSearch, dict[int, Replay]]:
    search = CeilingSearch(limit=limit, budget_bytes=probe.budget_bytes, look_above=2)
    for size in model.nodes:
        peak = probe.replays[size].peak_reserved_bytes
        search.tell(size, fits=peak <= probe.budget_bytes, peak_bytes=peak)
    predicted = {}
    while (asked := search.ask()) is not None:
        predicted[asked] = simulate(model.sizes(asked), model.template.events)
        peak = predicted[asked].peak_reserved_bytes
        search.tell(asked, fits=peak <= probe.budget_bytes, peak_bytes=peak)
    return search, predicted


def _checkpoint(ceiling: int, limit: int, probe: Probe) -> int:
    """Return where to check the model: at the ceiling, or above, where it was not made from."""
    size = max(ceiling, 1)
    while size > 1 and size in probe.runs and size < limit:
        size += 1
    return size


def _small_ceiling(probe: Probe, model: TraceModel) -> Ceiling:
    try:
        probe.fits(1)
    except WorkloadError as error:  # BatchNorm refuses one value per channel, say
        return Ceiling(micro_batch=0, limit_reached=False, model=model, reason=str(error))
    fitting = [size for size in probe.runs if probe.fits(size)]
    return Ceiling(micro_batch=max(fitting, default=0), limit_reached=False, model=model)


def _by_execution(probe: Probe, limit: int, reason: str) -> Ceiling:
    """Bisect with executions, guided by the peaks that they show."""

    def peak_bytes(size: int) -> int:
        probe.trace(size)
        return probe.replays[size].peak_reserved_bytes

    search = CeilingSearch(limit=limit, budget_bytes=probe.budget_bytes)
    for size in tuple(probe.runs):
        search.tell(size, fits=probe.fits(size), peak_bytes=peak_bytes(size))
    while (asked := search.ask()) is not None:
        search.tell(asked, fits=probe.fits(asked), peak_bytes=peak_bytes(asked))
    return Ceiling(
        micro_batch=search.ceiling,
        limit_reached=search.limit_reached,
        model=None,
        reason=reason,
    )
