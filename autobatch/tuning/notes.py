"""What a search has to tell the user, one line each: about a plan, or why there is none.

Invariant: a warning is something that the reader must act on, or the plan may not hold; a note says
what was inferred, assumed or left out, and how to say otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

from autobatch.devices.base import Run
from autobatch.gpus.catalogue import by_capacity
from autobatch.memory.lasting import lasting_bytes
from autobatch.memory.pairs import paired
from autobatch.records.footprint import Footprint
from autobatch.support.units import format_bytes
from autobatch.support.wording import argument, count, for_reader, given, passing
from autobatch.tuning.ceiling import Ceiling
from autobatch.tuning.probe import Probe
from autobatch.workload.workload import AUTOCAST_DTYPES

__all__ = ["plan_notes", "plan_warnings", "what_is_missing"]


_SOON = 1_000_000
"""Windows within which memory that grows is full, where that is said: a list of losses is small."""


_BF16_TENSOR_CORES = (8, 0)
"""The compute capability from which on cards multiply in bfloat16."""


def plan_warnings(
    probe: Probe, run: Run, found: Ceiling, planned: Footprint, steps: int
) -> Iterator[str]:
    """Yield the warnings of a plan of these steps and footprint, one line each."""
    yield from _growth(probe, planned, steps)
    yield from dict.fromkeys(note for each in probe.runs.values() for note in each.notes)
    yield from probe.device.notes()
    for trial in probe.trials:
        if not trial.fits and trial.micro_batch < found.micro_batch:
            yield (
                f"memory is not monotone here: micro-batch {trial.micro_batch:,} does not fit "
                f"({format_bytes(trial.peak_reserved_bytes)} reserved), though "
                f"{found.micro_batch:,} does"
            )
    if run.loss == "surrogate sum":
        yield (
            "no loss was given or found in the output: the sum of the outputs stood in for it; for "
            f"the memory of the real one, {passing('loss')}"
        )
    if found.is_quadratic:
        yield f"memory grows with the square of the micro-batch, {_COMPARED}"
    elif steps > 1 and (shape := _paired(probe)) is not None:
        size = " x ".join(map(str, shape))
        yield f"a tensor ({size} at a small micro-batch) pairs the samples, {_COMPARED}"


_COMPARED = (
    "as in-batch contrastive losses do: with accumulation, each sample is compared with those of "
    "its micro-batch only"
)


def _paired(probe: Probe) -> tuple[int, ...] | None:
    steps = probe.accumulation_steps
    runs = {size: run.trace for size, run in probe.runs.items()}
    return paired({size: each for size, each in runs.items() if each.accumulation_steps == steps})


def plan_notes(probe: Probe, run: Run, found: Ceiling, limit: int) -> Iterator[str]:
    """Yield what a plan was made with and from, one line each."""
    yield from probe.workload.notes
    if probe.workload.world_size > 1:
        yield (
            f"the buffers of NCCL between the {probe.workload.world_size:,} GPUs are outside "
            "PyTorch's allocator and not in the account: leave headroom for them"
        )
    if run.loss == "cross entropy":
        yield (
            "no loss was given: cross entropy between the model's output and the labels was taken; "
            f"if yours is another, {passing('loss')}"
        )
    if run.loss == "mean of output.loss":
        yield (
            "the model's own loss has several values, and their mean was taken: to reduce it as "
            f"your loop does, {passing('loss', 'lambda model, batch: …')}"
        )
    if run.loss in ("output.loss", "mean of output.loss"):
        yield (
            "the model's output counts until the next one has been computed, as in loops that say "
            "outputs = model(**batch); where yours drops it before, as the Trainer of Hugging Face "
            f"does, {passing('loss', 'lambda model, batch: model(**batch).loss')}"
        )
    if found.stopped:
        yield (
            f"{found.stopped}: the search stopped at micro-batch {found.micro_batch:,}, which "
            "fits; the ceiling is at least that"
        )
    elif found.limit_reached:
        yield f"the search stopped at micro-batch {limit:,}, which fits; the ceiling is higher"
    if found.reason is not None:
        yield f"sizes were executed one by one, because {found.reason}"


def _growth(probe: Probe, planned: Footprint, steps: int) -> Iterator[str]:
    """Say by how much memory grows from window to window, and when it is full.

    What is kept is taken to be kept of each micro-batch.
    """
    runs = sorted((size, each.grown_bytes) for size, each in probe.runs.items() if each.is_free)
    if len(runs) < 2:
        grown = runs[0][1] if runs else 0
    else:
        (small, low), (large, high) = runs[0], runs[-1]
        slope = (high - low) / (large - small)
        grown = int(low + slope * (planned.micro_batch - small))
    grown = grown * steps // probe.accumulation_steps
    left = max(0, probe.budget_bytes - planned.peak_reserved_bytes)
    if grown <= 0 or left // grown > _SOON:
        return
    windows = count(left // grown, "more window")
    yield (
        f"memory grows by about {format_bytes(grown)} with every window, and the budget is full "
        f"after about {windows}: something keeps tensors of past windows, such as a list of "
        "losses or outputs without .detach() or .item()"
    )


def what_is_missing(probe: Probe, found: Ceiling) -> str:
    """Say by how much the smallest size misses the budget, and what would help."""
    spec = probe.device.spec
    smallest = min(probe.runs)
    run = probe.runs[smallest]
    needed = run.replay.peak_reserved_bytes
    if run.shortage is not None:
        ideas = [*_less_activations(run), *_less_state(run)]
        ideas.append(f"a larger GPU ({argument('gpu')} simulates one)")
        return (
            f"not even micro-batch {smallest} fits on {spec.name}: it ran out of memory at "
            f"{format_bytes(needed)} reserved ({run.shortage}); the budget is "
            f"{format_bytes(probe.budget_bytes)}; try {_either(ideas)}"
        )
    short = needed - probe.budget_bytes
    large_enough = (
        card.name
        for card in by_capacity()
        if card.capacity_bytes > spec.capacity_bytes
        and (card.capacity_bytes - card.context_bytes) * (1 - probe.headroom) >= needed
    )
    ideas = list(_ideas(probe, run))
    if (larger := next(large_enough, None)) is not None:
        ideas.append(f"a larger GPU ({larger} would do)")
    elif probe.workload.is_sharded:
        ideas.append("more GPUs")
    else:
        shared = for_reader(", ", " ").join((given("world_size", 8), given("sharding", "fsdp")))
        ideas.append(f"sharding over several GPUs ({shared})")
    return (
        f"not even micro-batch {smallest} fits on {spec.name}: it needs {format_bytes(needed)} "
        f"reserved, the budget is {format_bytes(probe.budget_bytes)}, {format_bytes(short)} "
        f"({short:,} bytes) short; try {_either(ideas)}"
        + (f" (a smaller size does not run: {found.reason})" if smallest > 1 else "")
    )


def _ideas(probe: Probe, run: Run) -> Iterator[str]:
    """Yield what a run does not do yet and could let it fit, by what its memory is made of.

    What lasts from update to update has to fit in any case, so that less of the rest is no idea
    where this alone is too much.
    """
    workload, budget = probe.workload, probe.budget_bytes
    totals = run.trace.by_category(run.replay.peak_event)
    lasting = lasting_bytes(run.trace)
    if lasting <= budget:
        held = totals["activations"] + totals["temporaries"]
        # copies of the weights in half precision come with it, and are half of them
        if workload.autocast is None and workload.window is None and held > totals["parameters"]:
            has_bf16 = probe.device.spec.compute_capability >= _BF16_TENSOR_CORES
            half = "bf16" if has_bf16 else "fp16"
            if workload.is_sharded:
                dtype = AUTOCAST_DTYPES[half]
                yield f"MixedPrecisionPolicy(param_dtype={dtype}) for fully_shard"
            else:
                yield given("autocast", half)
        yield from _less_activations(run)
    if lasting - totals["optimizer_state"] <= budget:
        yield from _less_state(run)


def _less_activations(run: Run) -> Iterator[str]:
    """Yield checkpoints, unless blocks are recomputed already."""
    blocks = run.trace.blocks
    if not any(each.category == "activations" and each.phase == "backward" for each in blocks):
        yield "activation checkpointing"


def _less_state(run: Run) -> Iterator[str]:
    """Yield an optimizer with less state; a run that ended before a step may have some, too."""
    is_known = any(mark.phase == "step" for mark in run.trace.marks)
    if not is_known or any(each.category == "optimizer_state" for each in run.trace.blocks):
        yield "an optimizer with less state"


def _either(ideas: list[str]) -> str:
    """Join alternatives.

    >>> _either(["more memory"]), _either(["one", "two", "three"])
    ('more memory', 'one, two or three')
    """
    *others, last = ideas
    return f"{', '.join(others)} or {last}" if others else last
