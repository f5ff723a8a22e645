"""Experiments that find the suspects: what in a model or loss may make a window differ.

Invariant: nothing is judged by its name. An experiment shows a suspect, which becomes a culprit
only if the gradient changes when it is removed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autobatch.equivalence.compared_windows import changed_rows
from autobatch.equivalence.gradients import Ablation, Experiment
from autobatch.equivalence.module_calls import (
    LOSS,
    Call,
    RecordedRun,
    Rerun,
    embeddings_changed,
    module_hooks,
    recorded_calls,
    run_in_micro_batches,
)
from autobatch.equivalence.numerics import Numerics
from autobatch.equivalence.subject import Replica
from autobatch.equivalence.weights import IGNORED
from autobatch.workload.sample import named_tensors

__all__ = [
    "changed_buffers",
    "drawing_modules",
    "interaction",
    "mixing_modules",
    "recorded_run",
    "stateful_modules",
    "with_ignored_labels",
]

Span = tuple[int, int]
"""Start and end of some samples."""


def drawing_modules(experiment: Experiment) -> list[str]:
    """Return the modules whose own code draws random numbers, from torch, Python or NumPy."""
    replica, names = experiment.subject.replica(), []
    with torch.no_grad(), experiment.running(hold=False) as numerics:
        seen = _drawn(numerics)

        def note(name: str) -> None:
            nonlocal seen
            before, seen = seen, _drawn(numerics)
            if seen != before:
                names.append(name)

        def end(name: str, _caller: str, _inputs: Any, output: Any) -> Any:
            note(name)
            return output

        with module_hooks(replica.model, end, begin=note):
            replica.loss(replica.model, experiment.pieces()[0])
        note(LOSS)
    return list(dict.fromkeys(names))


def _drawn(numerics: Numerics) -> tuple[Any, ...]:
    """Return the state that changes whenever random numbers are drawn."""
    numpy: Any = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy else None
    others = (state[1].tobytes(), state[2]) if state else ()
    return numerics.draws, random.getstate(), *others


def recorded_run(experiment: Experiment) -> RecordedRun:
    """Record a run of the whole batch; its first micro-batch shows the sample axes."""
    rows, first = experiment.rows, experiment.window[0]

    def calls(samples: int) -> list[Call]:
        replica, batch = experiment.subject.replica(), rows.cut(0, samples)
        return recorded_calls(replica.model, lambda: _forward(experiment, replica, batch))

    return RecordedRun.of(calls(rows.size), rows.size, calls(first), first)


def mixing_modules(experiment: Experiment, recorded: RecordedRun) -> list[str]:
    """Return the modules in which a sample's output depends on other samples.

    The values of all samples after the first micro-batch are changed; the outputs for the first
    micro-batch must stay the same. Then the roles are exchanged, because a module may let only
    later samples depend on earlier ones.
    """
    first, size = experiment.window[0], experiment.rows.size
    names: list[str] = []
    for kept, changed in (((0, first), (first, size)), ((first, size), (0, first))):
        replica = experiment.subject.replica()
        batch = changed_rows(experiment.rows, [changed]).batch
        rerun = Rerun(recorded, kept=kept)
        names += rerun.run(replica.model, partial(_forward, experiment, replica, batch))
    return list(dict.fromkeys(names))


def stateful_modules(experiment: Experiment, recorded: RecordedRun) -> list[str]:
    """Return the modules whose output for the same input is another one in a second run."""
    replica = experiment.subject.replica()
    batch = experiment.rows.cut(0, experiment.rows.size)
    _forward(experiment, replica, batch)
    return Rerun(recorded).run(replica.model, lambda: _forward(experiment, replica, batch))


def changed_buffers(experiment: Experiment) -> list[str]:
    """Return the buffers that a forward pass in training mode changes."""
    before, after = experiment.subject.replica(), experiment.subject.replica()
    _forward(experiment, after, experiment.pieces()[0])
    old = dict(before.model.named_buffers())
    return [
        name
        for name, buffer in after.model.named_buffers()
        if name not in old or not torch.equal(buffer, old[name])
    ]


def interaction(experiment: Experiment, ablation: Ablation, recorded: RecordedRun) -> float:
    """Return how much samples interact in the loss, relative to their effect alone.

    The values of two groups of samples are changed, one group at a time and then both. If the loss
    is a sum over samples, or a mean whose weights do not depend on the values, the effect of
    changing both is the sum of the two effects. Zero where no value can be changed.
    """
    first, size = experiment.window[0], experiment.rows.size
    groups: tuple[Span, Span] = (0, first), (first, size)

    def loss(*changed: Span) -> float:
        replica = experiment.subject.replica()
        for name in ablation.layers:
            run_in_micro_batches(replica.model, name, recorded, experiment.window)
        batch = changed_rows(experiment.rows, changed).batch
        with embeddings_changed(replica.model, recorded, changed):
            return float(_forward(experiment, replica, batch))

    neither, one, other, both = loss(), loss(groups[0]), loss(groups[1]), loss(*groups)
    alone = max(abs(one - neither), abs(other - neither))
    if alone <= 1e-9 * abs(neither):
        return 0.0
    return abs((both - other) - (one - neither)) / alone


def with_ignored_labels(experiment: Experiment) -> Iterator[Experiment]:
    """Yield the experiment with half of the first sample's labels ignored, where none are.

    Losses ignore labels of -100. There is one experiment for each integer tensor that may hold
    labels.
    """
    rows = experiment.rows
    for path, tensor in named_tensors(rows.batch).items():
        if tensor.dtype != torch.int64 or tensor.dim() < 2 or path not in rows.dims:
            continue
        if bool((tensor == IGNORED).any()):
            continue
        changed = changed_rows(rows, ())
        first = named_tensors(changed.cut(0, 1))[path]  # a view
        half = first.shape[-1] // 2
        first[..., half:] = IGNORED
        yield replace(experiment, rows=changed)


def _forward(experiment: Experiment, replica: Replica, batch: Any) -> Tensor:
    with torch.no_grad(), experiment.running(hold=True):
        return replica.loss(replica.model, batch)
