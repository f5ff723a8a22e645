"""Find the largest micro-batch that fits with about three executions.

Two small traces give a trace model; the allocator simulation over it gives a ceiling; an execution
at that ceiling confirms the model, or corrects it. Where traces do not align, sizes are executed
one by one. Invariant: a ceiling that is returned was executed and fits (or, on a simulated GPU, the
window that will run was, where that needs no accumulation); the next size was executed, or
predicted not to fit by a model that had just been confirmed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autobatch.devices.base import Device, Run
from autobatch.errors import WorkloadError
from autobatch.gpus.budget import budget_bytes
from autobatch.memory.replay import Replay, simulate
from autobatch.memory.trace_model import Misaligned, TraceModel
from autobatch.records.evidence import Trial
from autobatch.records.progress import Progress, ProgressCallback
from autobatch.tuning.search import CeilingSearch
from autobatch.workload.workload import Workload

__all__ = ["Ceiling", "Probe", "find_ceiling"]

_SMALL = (2, 3)
"""The first two sizes: at 1 the order of events often differs (squeezed dimensions)."""

_EXPECTED = 3

_EXECUTIONS = 6
"""So often may an execution correct the model, before sizes are bisected."""

_NOTABLE_BEND = 1e-3
"""Above this share of quadratic terms, memory is called quadratic in the micro-batch."""

_ACTIONS = {"simulated": "simulating two training windows", "measured": "running windows"}


@dataclass(slots=True)
class Probe:
    """Executes a workload at sizes, and keeps the evidence.

    Attributes:
        headroom: share of the usable memory that stays free.
        trials: every execution, in order.
        runs: what each execution of the probed window gave, by micro-batch.
    """

    device: Device
    workload: Workload
    accumulation_steps: int
    progress: ProgressCallback
    headroom: float = 0.0
    trials: list[Trial] = field(default_factory=list)
    runs: dict[int, Run] = field(default_factory=dict)

    @property
    def budget_bytes(self) -> int:
        """What the windows may reserve; on a real GPU it falls while its context grows."""
        return budget_bytes(self.device.usable_bytes, self.headroom)

    def run(self, micro_batch: int) -> Run:
        """Execute a size, once."""
        if micro_batch not in self.runs:
            self.execute(micro_batch, self.accumulation_steps)
        return self.runs[micro_batch]

    def execute(self, micro_batch: int, accumulation_steps: int) -> Run:
        """Run two windows and log the trial; runs of the probed window are remembered."""
        evidence = self.device.evidence
        begin = Progress(
            step=f"{_ACTIONS[evidence]} of {accumulation_steps} accumulation step"
            + "s" * (accumulation_steps > 1),
            executions=len(self.trials),
            expected=max(_EXPECTED, len(self.trials) + 1),
            micro_batch=micro_batch,
        )
        self.progress(begin)
        run = self.device.run(
            self.workload, micro_batch=micro_batch, accumulation_steps=accumulation_steps
        )
        trial = Trial(
            micro_batch=micro_batch,
            accumulation_steps=accumulation_steps,
            fits=run.fits(self.budget_bytes),
            oom=run.shortage is not None,
            alloc_retries=run.replay.alloc_retries,
            peak_allocated_bytes=run.replay.peak_allocated_bytes,
            peak_reserved_bytes=run.replay.peak_reserved_bytes,
            seconds=run.seconds,
            evidence=evidence,
            window_seconds=run.window_seconds,
        )
        self.trials.append(trial)
        if accumulation_steps == self.accumulation_steps:
            self.runs[micro_batch] = run
        self.progress(replace(begin, executions=len(self.trials), trial=trial))
        return run

    def fits(self, micro_batch: int) -> bool:
        """Execute a size, once, and tell whether it stays within the budget."""
        return self.run(micro_batch).fits(self.budget_bytes)

    def peak_bytes(self, micro_batch: int) -> int | None:
        """Return what an executed size reserved; None where the limit had a hand in it."""
        run = self.runs[micro_batch]
        return run.replay.peak_reserved_bytes if run.is_free else None

    def predict(self, model: TraceModel, micro_batch: int) -> Replay:
        """Return what the allocator would do with the model's trace at a size."""
        template = model.template
        return simulate(
            model.sizes(micro_batch),
            template.events,
            allocator=self.device.allocator(),
            streams=template.streams,
        )


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
    whole: Run | None = None
    predicted: Mapping[int, Replay] = field(default_factory=dict)

    @property
    def is_quadratic(self) -> bool:
        """Whether memory grows with the square of the micro-batch."""
        return self.model is not None and self.model.bent_share > _NOTABLE_BEND

    @property
    def method(self) -> str:
        """How it was found, as a plan names it."""
        if self.model is None:
            return "bisection"
        return "trace model (quadratic)" if self.is_quadratic else "trace model"


def find_ceiling(
    probe: Probe,
    limit: int,
    wanted: int | None = None,
    *,
    prove: bool = False,
    guess: Callable[[], int | None] = lambda: None,
) -> Ceiling:
    """Find the largest micro-batch in [1, limit] whose windows stay within the budget.

    Args:
        probe: executes the workload with its accumulation steps.
        limit: largest size to consider.
        wanted: samples of one update on one GPU. Where the ceiling allows them all at once, a
            window of one such micro-batch is executed in place of one at the ceiling: it is what
            will run, and its beginning checks the model as well.
        prove: execute the size above the ceiling too, which must not fit.
        guess: a ceiling to try first where sizes have to be executed one by one.
    """
    first, second = (min(size, limit) for size in _SMALL)
    if first == second:
        return _by_execution(probe, limit, reason="only sizes up to 2 are possible")
    try:
        for size in (first, second):
            if (shortage := probe.run(size).shortage) is not None:
                raise Misaligned(f"micro-batch {size} runs out of memory ({shortage})")
        return _by_model(probe, limit, wanted, prove)
    except Misaligned as error:
        return _by_execution(probe, limit, reason=str(error), guess=guess)


def _by_model(probe: Probe, limit: int, wanted: int | None, prove: bool) -> Ceiling:
    """Follow the model to a ceiling that was executed, corrected by each execution on the way.

    Raises:
        Misaligned: the executions follow no quadratic in the micro-batch.
    """
    model = _fit(probe, [n for n in probe.runs if n <= max(_SMALL)])
    search, predicted = _search_model(model, probe, limit)
    confirmed = False
    for _ in range(_EXECUTIONS):
        ceiling = search.ceiling
        if wanted is not None and max(_SMALL) < wanted <= ceiling:
            whole = probe.execute(wanted, 1)
            wanted = None
            if model.foretells_start_of(whole.trace) and probe.trials[-1].fits:
                return _modelled(search, model, predicted, whole)
        size = _next_check(ceiling, limit, probe, confirmed)
        if size == 1:  # one sample may be allocated in an order of its own
            return _small_ceiling(probe, model)
        if size is None and prove and ceiling < limit and ceiling + 1 not in probe.runs:
            size = ceiling + 1
            if not probe.fits(size):
                return _modelled(search, model, predicted)
        if size is None:
            return _modelled(search, model, predicted)
        if (shortage := probe.run(size).shortage) is not None:
            raise Misaligned(f"micro-batch {size} ran out of memory ({shortage})")
        corrected = _corrected(model, probe, size)
        confirmed = corrected is model
        if not confirmed:
            model = corrected
            search, predicted = _search_model(model, probe, limit)
    raise Misaligned("memory kept departing from what smaller sizes foretold")


def _modelled(
    search: CeilingSearch,
    model: TraceModel,
    predicted: Mapping[int, Replay],
    whole: Run | None = None,
) -> Ceiling:
    return Ceiling(
        micro_batch=search.ceiling,
        limit_reached=search.limit_reached,
        model=model,
        whole=whole,
        predicted=predicted,
    )


def _fit(probe: Probe, sizes: Sequence[int]) -> TraceModel:
    traces = [probe.run(size).trace for size in sizes]
    return TraceModel.fit(traces, scratch_may_vary=probe.device.evidence == "measured")


def _corrected(model: TraceModel, probe: Probe, size: int) -> TraceModel:
    """Return the model if an execution is as it foretold, else one that knows of it.

    Raises:
        Misaligned: there is none.
    """
    if probe.device.evidence == "measured":
        complete = sorted(n for n, run in probe.runs.items() if run.shortage is None)
        return _fit(probe, [complete[0], *complete[-2:]])  # nearest to where it is asked
    difference = model.difference(probe.run(size).trace)
    if difference is None:
        return model
    if len(model.nodes) == 3:
        raise Misaligned(difference)
    return _fit(probe, [*model.nodes, size])


def _search_model(
    model: TraceModel, probe: Probe, limit: int
) -> tuple[CeilingSearch, dict[int, Replay]]:
    search = CeilingSearch(limit=limit, budget_bytes=probe.budget_bytes, look_above=2)
    for size in probe.runs:
        search.tell(size, fits=probe.fits(size), peak_bytes=probe.peak_bytes(size))
    predicted = {}
    unforeseen = _unforeseen_bytes(model, probe)
    while (asked := search.ask()) is not None:
        foretold = probe.predict(model, asked)
        peak = foretold.peak_reserved_bytes + unforeseen
        predicted[asked] = replace(foretold, peak_reserved_bytes=peak)
        search.tell(asked, fits=peak <= probe.budget_bytes, peak_bytes=peak)
    return search, predicted


def _unforeseen_bytes(model: TraceModel, probe: Probe) -> int:
    """Return what the allocator of a real GPU reserved beyond the simulated one."""
    if probe.device.evidence != "measured":
        return 0
    largest = model.nodes[-1]
    measured = probe.peak_bytes(largest)
    if measured is None:
        return 0
    return measured - probe.predict(model, largest).peak_reserved_bytes


def _next_check(ceiling: int, limit: int, probe: Probe, confirmed: bool) -> int | None:
    """Return the size to execute next, or None where the ceiling stands."""
    size = max(ceiling, 1)
    if probe.device.evidence == "measured":
        return None if size in probe.runs else size
    if confirmed:
        return None
    # a model made from the ceiling is checked above it, where a simulation cannot run out
    return next((n for n in range(size, limit + 1) if n not in probe.runs), None)


def _small_ceiling(probe: Probe, model: TraceModel) -> Ceiling:
    try:
        probe.fits(1)
    except WorkloadError as error:  # BatchNorm refuses one value per channel, say
        return Ceiling(micro_batch=0, limit_reached=False, model=model, reason=str(error))
    fitting = [size for size in probe.runs if probe.fits(size)]
    return Ceiling(micro_batch=max(fitting, default=0), limit_reached=False, model=model)


def _by_execution(
    probe: Probe,
    limit: int,
    reason: str,
    guess: Callable[[], int | None] = lambda: None,
) -> Ceiling:
    """Bisect with executions, guided by the peaks that they show."""
    search = CeilingSearch(limit=limit, budget_bytes=probe.budget_bytes)

    def told(size: int) -> None:
        search.tell(size, fits=probe.fits(size), peak_bytes=probe.peak_bytes(size))

    for size in tuple(probe.runs):
        told(size)
    first = guess()
    if first is not None and search.ceiling < first <= limit and search.ask() is not None:
        told(first)
    while (asked := search.ask()) is not None:
        told(asked)
    return Ceiling(
        micro_batch=search.ceiling,
        limit_reached=search.limit_reached,
        model=None,
        reason=reason,
    )
