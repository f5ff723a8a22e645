"""Experiments that find the suspects: what in a model may make a window differ.

Invariant: nothing is judged by its name. An experiment shows a suspect, which becomes a culprit
only if the gradient changes when it is removed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from autobatch.equivalence.compared_windows import changed_rows
from autobatch.equivalence.draws import Span
from autobatch.equivalence.experiment import Experiment
from autobatch.equivalence.module_calls import Call, RecordedRun, Rerun, recorded_calls
from autobatch.equivalence.subject import Replica

__all__ = ["changed_buffers", "mixing_modules", "recorded_run", "stateful_modules"]


def recorded_run(experiment: Experiment, seed: int) -> RecordedRun:
    """Record a run of the whole batch; its smallest micro-batch shows the sample axes."""
    sizes, rows = experiment.window, experiment.rows
    few = min(sizes)
    start = sum(sizes[: sizes.index(few)])

    def calls(span: Span) -> list[Call]:
        batch = rows.cut(*span)

        def run(replica: Replica) -> list[Call]:
            return recorded_calls(replica.model, lambda: replica.loss(replica.model, batch))

        found: list[Call] = experiment.forward(batch, run=run, rows=span, seed=seed)
        return found

    return RecordedRun.of(calls((0, rows.size)), rows.size, calls((start, start + few)), few)


def mixing_modules(experiment: Experiment, recorded: RecordedRun, seed: int) -> list[str]:
    """Return the modules in which a sample's output depends on other samples.

    The values of all samples after the first micro-batch are changed; the outputs for the first
    micro-batch must stay the same. Then the roles are exchanged, because a module may let only
    later samples depend on earlier ones.
    """
    first, size = experiment.window[0], experiment.rows.size
    names: list[str] = []
    for kept, changed in (((0, first), (first, size)), ((first, size), (0, first))):
        batch = changed_rows(experiment.rows, [changed]).batch
        names += _rerun(experiment, Rerun(recorded, kept=kept), batch, seed)
    return list(dict.fromkeys(names))


def stateful_modules(experiment: Experiment, recorded: RecordedRun, seed: int) -> list[str]:
    """Return the modules whose output for the same input is another one in a second run."""
    replica = experiment.subject.replica()
    batch = experiment.rows.cut(0, experiment.rows.size)
    experiment.forward(batch, replica=replica, seed=seed)
    return _rerun(experiment, Rerun(recorded), batch, seed, replica)


def changed_buffers(experiment: Experiment) -> list[str]:
    """Return the buffers that a forward pass in training mode changes."""
    before, after = experiment.subject.replica(), experiment.subject.replica()
    span = (0, experiment.window[0])
    experiment.forward(experiment.rows.cut(*span), replica=after, rows=span)
    old = dict(before.model.named_buffers())
    return [
        name
        for name, buffer in after.model.named_buffers()
        if name not in old or not torch.equal(buffer, old[name])
    ]


def _rerun(
    experiment: Experiment, rerun: Rerun, batch: Any, seed: int, replica: Replica | None = None
) -> list[str]:
    def run(replica: Replica) -> list[str]:
        return rerun.run(replica.model, partial(replica.loss, replica.model, batch))

    names: list[str] = experiment.forward(batch, run=run, replica=replica, seed=seed)
    return names
