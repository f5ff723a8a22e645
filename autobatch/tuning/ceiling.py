"""Find the largest micro-batch that fits with two or three executions.

Traces give a trace model; the allocator simulation over it gives a ceiling; an execution at that
ceiling confirms the model, or corrects it. On a simulated GPU one trace mostly is enough, at a
prime micro-batch; or two, or three where elements are spread equally over parts and each part is
rounded up. On a real one kernels take other ways, and other scratch memory, at large sizes than at
small ones, so that two traces are taken close to the ceiling which a simulation foresees. Where
traces do not align, sizes are executed one by one. Invariant: a ceiling that is returned was
executed and fits (or, on a simulated GPU and of a model of several traces, the window that will run
was, where that needs no accumulation); the next size was executed, or predicted not to fit by a
model that had just been confirmed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from autobatch.devices.base import Run
from autobatch.errors import AutobatchError, HostMemoryError, WorkloadError
from autobatch.memory.alignment import Misaligned
from autobatch.memory.interpolation import nodes_for
from autobatch.memory.one_trace import is_plausible
from autobatch.memory.replay import Replay
from autobatch.memory.trace_model import Refuted, TraceModel
from autobatch.tuning.first_sizes import SMALL, first_size
from autobatch.tuning.probe import Probe
from autobatch.tuning.search import CeilingSearch

__all__ = ["LOOK_ABOVE", "Ceiling", "find_ceiling"]

LOOK_ABOVE = 2
"""So many sizes beyond the first that does not fit are asked of a model, which costs little."""

_NEAR = 0.95
"""The first execution on a real GPU is at this share of the ceiling that a simulation foresees."""

_EXECUTIONS = 6
"""So often may an execution correct the model, before sizes are bisected."""

_RETREAT = 0.95
"""After a size that ran out of memory although the model foretold that it fits, this share of it is
executed, and of that again: on an H200, reserved peaks at the ceiling were foretold up to 9 % too
low (`reports/hardware`), most of them less than 1 %."""

SECONDS_BEYOND = 20.0
"""So long are sizes executed one by one, beyond those that the target needs."""

_SECONDS_AN_EVENT = 2e-4
"""What a simulated run is taken to need for each event of its trace. It stands for the time that
was needed, so that no answer depends on how busy the machine is: large models need 5e-5 on a usual
machine, batches of many small tensors 3e-4."""

_NOTABLE_BEND = 1e-3
"""Above this share of quadratic terms, memory is called quadratic in the micro-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The answer of the search.

    Attributes:
        micro_batch: largest size that fits; 0 when not even one sample does.
        limit_reached: the search stopped at its limit, and the true ceiling may be higher.
        stopped: why it stopped although larger sizes may fit; None where it did not.
        model: reproduces the executed traces; None where they do not align.
        reason: why there is no model; None where there is one.
        whole: the executed window without accumulation, where that is what will run.
        predicted: what the model foretold at the sizes that the search looked at.
        is_quadratic: whether memory was shown to grow with the square of the micro-batch.
    """

    micro_batch: int
    limit_reached: bool
    model: TraceModel | None
    reason: str | None = None
    stopped: str | None = None
    whole: Run | None = None
    predicted: Mapping[int, Replay] = field(default_factory=dict)
    is_quadratic: bool = False

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
    share: int | None = None,
    foresee: Callable[[], Ceiling | None] = lambda: None,
) -> Ceiling:
    """Find the largest micro-batch in [1, limit] whose windows stay within the budget.

    Args:
        probe: executes the workload with its accumulation steps.
        limit: largest size to consider.
        wanted: samples of one update on one GPU. Where the ceiling allows them all at once, and the
            model is of several traces, a window of one such micro-batch is executed in place of one
            at the ceiling: it is what will run, and its beginning checks the model as well.
        prove: execute the size above the ceiling too, which must not fit.
        share: samples of one update on one GPU, as far as sizes that have to be executed one by one
            are looked at without regard to time.
        foresee: gives the ceiling that a simulation of the same GPU finds, if it finds one. What
            is executed is chosen by it, what is answered is not.
    """
    foreseen = foresee()
    try:
        return _find_ceiling(probe, limit, wanted, prove=prove, share=share, foreseen=foreseen)
    except HostMemoryError as error:
        largest = max((size for size in probe.runs if probe.fits(size)), default=0)
        if not largest:
            raise
        stopped = f"larger sizes need memory of this machine that it does not have ({error})"
    found = _find_ceiling(probe, max(largest, *SMALL), wanted, prove=prove, share=share)
    return replace(found, stopped=stopped, limit_reached=True) if found.limit_reached else found


def _find_ceiling(
    probe: Probe,
    limit: int,
    wanted: int | None,
    *,
    prove: bool,
    share: int | None,
    foreseen: Ceiling | None = None,
) -> Ceiling:
    if limit < max(SMALL):
        return _by_execution(probe, limit, reason="only sizes up to 2 are possible", share=share)
    guess = foreseen.micro_batch if foreseen is not None else None
    reason = ""
    is_refuted = False
    # a simulation's kernels vary where they take scratch memory at large sizes only
    for kernels_may_vary in (True,) if probe.device.scratch_varies else (False, True):
        follow = partial(_by_model, probe, limit, wanted, prove, kernels_may_vary)
        try:
            if foreseen is not None and (near := _near(probe, limit, foreseen)):
                return _marked_quadratic(follow(near), probe, is_refuted)
            return _marked_quadratic(_from_small(probe, limit, follow), probe, is_refuted)
        except Misaligned as error:
            reason = reason or str(error)
            is_refuted = is_refuted or isinstance(error, Refuted)
    return _by_execution(probe, limit, reason=reason, share=share, guess=guess)


def _marked_quadratic(found: Ceiling, probe: Probe, is_refuted: bool) -> Ceiling:
    """Return a ceiling that says whether memory was shown to be quadratic in the micro-batch.

    A quadratic counts only if a fourth executed size lies on it, as one goes through any three.
    Where an exact one missed a size, one that is near all of them shows nothing.
    """
    model = found.model
    if model is None:
        return found
    largest = max(found.micro_batch, model.nodes[-1])
    if model.quadratic_share(largest) <= _NOTABLE_BEND:
        return found
    others = (run.trace for size, run in probe.runs.items() if size not in model.nodes)
    is_shown = not is_refuted
    if model.is_exact:
        is_shown = found.whole is not None or any(model.difference(t) is None for t in others)
    return replace(found, is_quadratic=is_shown)


def _from_small(probe: Probe, limit: int, follow: Callable[[tuple[int, ...]], Ceiling]) -> Ceiling:
    """Follow a model of one size, or of two or three where it tells too little.

    Raises:
        Misaligned: small sizes tell nothing of larger ones.
    """
    first = first_size(probe.workload)
    if probe.device.is_simulated and max(SMALL) < first < limit and _tells(probe, first):
        try:
            return follow((first,))
        except Misaligned:
            # code may take another way from some size on, which is below the first one
            if min(probe.runs) == first or min(SMALL) in probe.runs:
                raise
    return follow(_small_nodes(probe, limit))


def _tells(probe: Probe, first: int) -> bool:
    """Whether a first size seems to tell of all others."""
    try:
        return is_plausible(TraceModel.fit([probe.run(first).trace]))
    except AutobatchError:
        return False  # code that takes no odd number of samples, or not so many, gets fewer


def _small_nodes(probe: Probe, limit: int) -> tuple[int, ...]:
    """Execute two small sizes, and return those that a model is to be fitted to.

    Raises:
        Misaligned: they tell nothing of larger ones.
    """
    for size in SMALL:
        try:
            shortage = probe.run(size).shortage
        except WorkloadError as error:
            if not (ran := [n for n in probe.runs if n > 1]):
                raise
            raise WorkloadError(
                f"{error}; micro-batch {min(ran)} ran: where the code takes multiples of a size "
                "alone, count groups of that size, by a function that makes n of them as batch"
            ) from error.__cause__
        if shortage is not None:
            raise Misaligned(f"micro-batch {size} runs out of memory ({shortage})")
    return nodes_for([probe.run(size).trace for size in SMALL], limit)


def _near(probe: Probe, limit: int, foreseen: Ceiling) -> tuple[int, ...]:
    """Execute two sizes close to the ceiling, and return them; or none where that cannot be.

    The first is a little below what is foreseen. What it took beyond the simulation is taken to
    come on top at every size, which gives the second.
    """
    first = min(int(_NEAR * foreseen.micro_batch), limit)
    if foreseen.model is None or first <= max(SMALL) or probe.run(first).shortage is not None:
        return ()
    beyond = probe.runs[first].replay.peak_reserved_bytes
    beyond -= probe.predict(foreseen.model, first).peak_reserved_bytes
    search, _ = _search_model(foreseen.model, probe, limit, beyond)
    second = search.ceiling if search.ceiling not in (0, first) else min(SMALL)
    while probe.run(second).shortage is not None:  # what was not foreseen is seen below it
        if second == min(SMALL):
            return ()
        second = int(_RETREAT * second) if int(_RETREAT * second) > first else min(SMALL)
    return first, second


def _by_model(
    probe: Probe,
    limit: int,
    wanted: int | None,
    prove: bool,
    kernels_may_vary: bool,
    sizes: Sequence[int],
) -> Ceiling:
    """Follow the model to a ceiling that was executed, corrected by each execution on the way.

    Raises:
        Misaligned: the executions follow no quadratic in the micro-batch.
    """
    model = _fit_nearest(probe) if kernels_may_vary else _fit(probe, sizes)
    search, predicted = _search_model(model, probe, limit)
    confirmed = False
    # what foretells a size that is known to be another one hardly foretells the next
    prove = prove or (kernels_may_vary and probe.device.is_simulated)
    for _ in range(_EXECUTIONS):
        ceiling = search.ceiling
        if not kernels_may_vary and (size := _refuting(model, probe, ceiling)) is not None:
            model = _corrected(model, probe, size)
            search, predicted = _search_model(model, probe, limit)
            continue
        if wanted is not None and _confirms(model, wanted) and wanted <= ceiling:
            whole = probe.execute(wanted, 1)
            wanted = None
            if model.predicts_start_of(whole.trace) and probe.trials[-1].fits:
                return _modelled(search, model, predicted, whole)
        is_corrected = not kernels_may_vary and len(model.nodes) > len(sizes)
        size = _next_check(ceiling, limit, probe, confirmed, kernels_may_vary, is_corrected)
        if size == 1:  # one sample may be allocated in an order of its own
            return _small_ceiling(probe, model)
        if size is None and prove and ceiling < limit and ceiling + 1 not in probe.runs:
            size = ceiling + 1
            if not probe.fits(size):
                return _modelled(search, model, predicted)
        if size is None:
            return _modelled(search, model, predicted)
        while (shortage := probe.run(size).shortage) is not None:
            size = int(_RETREAT * size)  # a size that runs through tells what was not foreseen
            if size <= max(SMALL):
                raise Misaligned(f"micro-batch {size + 1} ran out of memory ({shortage})")
        corrected = _fit_nearest(probe) if kernels_may_vary else _corrected(model, probe, size)
        confirmed = corrected is model
        if not confirmed:
            model = corrected
            search, predicted = _search_model(model, probe, limit)
    raise Refuted("memory kept departing from what smaller sizes foretold")


def _refuting(model: TraceModel, probe: Probe, ceiling: int) -> int | None:
    """Return a size up to the ceiling that was executed before, and is not as a model foretells."""
    others = (n for n in sorted(probe.runs) if model.nodes[-1] < n <= ceiling)
    return next((n for n in others if model.difference(probe.run(n).trace) is not None), None)


def _confirms(model: TraceModel, wanted: int) -> bool:
    """Whether a window of one micro-batch of this size confirms a model as the ceiling does.

    It has only the forward and backward pass in common with the windows of the model, which is too
    little for what one trace seemed to tell.
    """
    return len(model.nodes) > 1 and wanted > max(SMALL)


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
    return TraceModel.fit([probe.run(size).trace for size in sizes])


def _fit_nearest(probe: Probe) -> TraceModel:
    """Fit what may vary from size to size by the largest sizes, which are nearest to the ceiling.

    Raises:
        Misaligned: traces have too little in common.
    """
    if len(probe.runs) == 1:
        probe.run(next(iter(probe.runs)) + 1)
    complete = sorted(n for n, run in probe.runs.items() if run.shortage is None)
    chosen = sorted({complete[0], *complete[-2:]})
    traces = [probe.runs[size].trace for size in chosen]
    return TraceModel.fit(traces, kernels_may_vary=True)


def _corrected(model: TraceModel, probe: Probe, size: int) -> TraceModel:
    """Return the model if an execution is as it foretold, else one that knows of it.

    Raises:
        Misaligned: there is none.
    """
    difference = model.difference(probe.run(size).trace)
    if difference is None:
        return model
    if len(model.nodes) == 3:
        raise Refuted(difference)
    return _fit(probe, [*model.nodes, size])


def _search_model(
    model: TraceModel, probe: Probe, limit: int, unforeseen: int | None = None
) -> tuple[CeilingSearch, dict[int, Replay]]:
    """Search with what a model foretells, and what comes on top of it, known or not."""
    search = CeilingSearch(limit=limit, budget_bytes=probe.budget_bytes, look_above=LOOK_ABOVE)
    for size in probe.runs:
        search.tell(size, fits=probe.fits(size), peak_bytes=probe.peak_bytes(size))
    predicted = {}
    if unforeseen is None:
        unforeseen = _unforeseen_bytes(model, probe)
    while (asked := search.ask()) is not None:
        foretold = probe.predict(model, asked)
        peak = foretold.peak_reserved_bytes + unforeseen
        predicted[asked] = replace(foretold, peak_reserved_bytes=peak)
        search.tell(asked, fits=peak <= probe.budget_bytes, peak_bytes=peak)
    return search, predicted


def _unforeseen_bytes(model: TraceModel, probe: Probe) -> int:
    """Return what the allocator of a real GPU reserved beyond the simulated one."""
    if not probe.device.scratch_varies:
        return 0
    largest = model.nodes[-1]
    measured = probe.peak_bytes(largest)
    if measured is None:
        return 0
    return measured - probe.predict(model, largest).peak_reserved_bytes


def _next_check(
    ceiling: int,
    limit: int,
    probe: Probe,
    confirmed: bool,
    kernels_may_vary: bool,
    is_corrected: bool,
) -> int | None:
    """Return the size to execute next, or None where the ceiling stands."""
    size = max(ceiling, 1)
    if kernels_may_vary:
        return None if size in probe.runs else size
    if ceiling < min(SMALL):  # one sample is for last, because it may have an order of its own
        return 1 if min(SMALL) in probe.runs else min(SMALL)
    if confirmed:
        return None
    # a model made from the ceiling is checked above it, where a simulation cannot run out
    above = next((n for n in range(size, limit + 1) if n not in probe.runs), None)
    if above is not None or not is_corrected:
        return above
    # that it goes through the limit, of which it was made, shows nothing of a corrected one
    return next((n for n in range(limit - 1, max(SMALL), -1) if n not in probe.runs), None)


def _small_ceiling(probe: Probe, model: TraceModel | None) -> Ceiling:
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
    share: int | None = None,
    guess: int | None = None,
) -> Ceiling:
    """Bisect with executions, guided by the peaks that they show.

    Once `share` samples fit, larger sizes are looked at for SECONDS_BEYOND only; that ends the
    search also where `share` itself is far, and a size that is expected to take longer is halved.
    """
    search = CeilingSearch(limit=limit, budget_bytes=probe.budget_bytes)

    def told(size: int) -> None:
        search.tell(size, fits=probe.fits(size), peak_bytes=probe.peak_bytes(size))

    for size in tuple(probe.runs):
        told(size)
    if guess is not None and search.ceiling < guess <= limit and search.ask() is not None:
        told(guess)
    before = set(probe.runs)
    gave_up = False
    while (asked := search.ask()) is not None:
        known = search.ceiling
        if share is not None and known and asked > known:
            spent = sum(_seconds(probe, size) for size in probe.runs.keys() - before)
            left = SECONDS_BEYOND - spent
            if known < share < asked and share not in probe.runs:
                asked = share
            affordable = int(known * max(left, 0) / _seconds(probe, known))
            if asked > affordable and (asked > share or affordable <= known):
                asked = min(affordable, limit)
                if asked in probe.runs or asked < known + max(known // 4, 1):
                    gave_up = True
                    break
        told(asked)
    return Ceiling(
        micro_batch=search.ceiling,
        limit_reached=search.limit_reached or gave_up,
        stopped="larger sizes take long to execute" if gave_up else None,
        model=None,
        reason=reason,
    )


def _seconds(probe: Probe, size: int) -> float:
    """Return what the execution of a size takes; where it is simulated, by its events."""
    run = probe.run(size)
    is_simulated = probe.device.is_simulated
    return max(len(run.trace.events) * _SECONDS_AN_EVENT if is_simulated else run.seconds, 1e-3)
