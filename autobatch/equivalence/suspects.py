"""Experiments that tell what in a model or loss may make a window differ from its batch.

Invariant: nothing is judged by its name; a suspect is what an experiment shows, and becomes a
culprit only where the gradient changes when it is taken away.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autobatch.equivalence.arithmetic import Arithmetic
from autobatch.equivalence.gradients import Experiment, Mends
from autobatch.equivalence.layers import (
    OWN_LOSS,
    Call,
    Layout,
    Replay,
    embeddings_changed,
    hooked,
    one_micro_batch_at_a_time,
    otherwise,
    recorded,
)
from autobatch.equivalence.subject import Copy
from autobatch.equivalence.weights import IGNORED
from autobatch.workload.sample import Rows, named_tensors
from autobatch.workload.tree import map_tensors

__all__ = [
    "changed_buffers",
    "drawing_modules",
    "interaction",
    "layout_of",
    "mixing_modules",
    "stateful_modules",
    "with_ignored_labels",
]

Span = tuple[int, int]


def drawing_modules(experiment: Experiment) -> list[str]:
    """Return the modules that draw random numbers in their own code: torch's, Python's, NumPy's."""
    copy, names = experiment.subject.copy(), []
    with torch.no_grad(), experiment.running(hold=False) as arithmetic:
        seen = _drawn(arithmetic)

        def note(name: str) -> None:
            nonlocal seen
            before, seen = seen, _drawn(arithmetic)
            if seen != before:
                names.append(name)

        def end(name: str, _caller: str, _inputs: Any, output: Any) -> Any:
            note(name)
            return output

        with hooked(copy.model, end, begin=note):
            copy.loss(copy.model, experiment.pieces()[0])
        note(OWN_LOSS)
    return list(dict.fromkeys(names))


def _drawn(arithmetic: Arithmetic) -> tuple[Any, ...]:
    """Return what changes when random numbers are drawn."""
    numpy: Any = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy else None
    others = (state[1].tobytes(), state[2]) if state else ()
    return arithmetic.draws, random.getstate(), *others


def layout_of(experiment: Experiment) -> Layout:
    """Run the whole batch and its first micro-batch, and compare their tensors."""
    rows, first = experiment.rows, experiment.window[0]

    def calls(samples: int) -> list[Call]:
        copy, batch = experiment.subject.copy(), rows.cut(0, samples)
        return recorded(copy.model, lambda: _forward(experiment, copy, batch))

    return Layout.of(calls(rows.size), rows.size, calls(first), first)


def mixing_modules(experiment: Experiment, layout: Layout) -> list[str]:
    """Return the modules in which a sample's output depends on other samples.

    The samples after the first micro-batch get other values; what comes out for those of the first
    must stay as it was. Then the other way round: who comes first may be served first.
    """
    first, size = experiment.window[0], experiment.rows.size
    names: list[str] = []
    for kept, changed in (((0, first), (first, size)), ((first, size), (0, first))):
        copy = experiment.subject.copy()
        batch = _with_other_values(experiment.rows, [changed])
        replay = Replay(layout, kept=kept)
        names += replay.run(copy.model, partial(_forward, experiment, copy, batch))
    return list(dict.fromkeys(names))


def stateful_modules(experiment: Experiment, layout: Layout) -> list[str]:
    """Return the modules that answer the same input otherwise when they are called again."""
    copy = experiment.subject.copy()
    batch = experiment.rows.cut(0, experiment.rows.size)
    _forward(experiment, copy, batch)
    return Replay(layout).run(copy.model, lambda: _forward(experiment, copy, batch))


def changed_buffers(experiment: Experiment) -> list[str]:
    """Return the buffers that a forward pass in training changes."""
    before, after = experiment.subject.copy(), experiment.subject.copy()
    _forward(experiment, after, experiment.pieces()[0])
    old = dict(before.model.named_buffers())
    return [
        name
        for name, buffer in after.model.named_buffers()
        if name not in old or not torch.equal(buffer, old[name])
    ]


def interaction(experiment: Experiment, mends: Mends, layout: Layout) -> float:
    """Return how far the loss lets samples interact, relative to what they do alone.

    Two groups of samples get other values, one at a time and together. In a sum over samples, or a
    mean with weights that the values do not enter, the second change does to the loss what it does
    without the first. Zero where no value can be changed.
    """
    first, size = experiment.window[0], experiment.rows.size
    groups: tuple[Span, Span] = (0, first), (first, size)

    def loss(*changed: Span) -> float:
        copy = experiment.subject.copy()
        for name in mends.layers:
            one_micro_batch_at_a_time(copy.model, name, layout, experiment.window)
        batch = _with_other_values(experiment.rows, changed)
        with embeddings_changed(copy.model, layout, changed):
            return float(_forward(experiment, copy, batch))

    neither, one, other, both = loss(), loss(groups[0]), loss(groups[1]), loss(*groups)
    alone = max(abs(one - neither), abs(other - neither))
    if alone <= 1e-9 * abs(neither):
        return 0.0
    return abs((both - other) - (one - neither)) / alone


def with_ignored_labels(experiment: Experiment) -> Iterator[Experiment]:
    """Yield the experiment with half of the first sample's entries ignored, where all count.

    Losses leave out labels of -100. One experiment for each tensor of integers that may hold them.
    """
    rows = experiment.rows
    for path, tensor in named_tensors(rows.batch).items():
        if tensor.dtype != torch.int64 or tensor.dim() < 2 or path not in rows.dims:
            continue
        if bool((tensor == IGNORED).any()):
            continue
        changed = Rows(map_tensors(Tensor.clone, rows.batch), rows.size, rows.dims, rows.whole)
        first = named_tensors(changed.cut(0, 1))[path]  # a view
        half = first.shape[-1] // 2
        first[..., half:] = IGNORED
        yield replace(experiment, rows=changed)


def _forward(experiment: Experiment, copy: Copy, batch: Any) -> Tensor:
    with torch.no_grad(), experiment.running(hold=True):
        return copy.loss(copy.model, batch)


def _with_other_values(rows: Rows, spans: Sequence[Span]) -> Any:
    """Return the whole batch with other floating-point values for some samples."""
    whole = Rows(map_tensors(Tensor.clone, rows.batch), rows.size, rows.dims, rows.whole)
    for start, stop in spans:
        for part in named_tensors(whole.cut(start, stop)).values():  # views
            if part.is_floating_point():
                part.copy_(otherwise(part))
    return whole.batch
