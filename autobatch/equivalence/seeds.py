"""Seeds whose random numbers make a model run other code, such as a layer that is often left out.

Invariant: seeds are looked for only where code depends on draws: Python or NumPy drew numbers, or a
value was read after PyTorch had drawn.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

from autobatch.equivalence.draws import Draws
from autobatch.equivalence.experiment import Experiment, seed_all
from autobatch.equivalence.module_calls import LOSS, module_hooks

__all__ = ["seeds_of_other_code"]

_TRIED = 40
"""A branch that is taken one time in ten is missed once in 70 checks."""

_VERIFIED = 4

_Trace = set[tuple[str, int]]
"""Modules, each with a hash of the ops that its own code ran."""


def seeds_of_other_code(experiment: Experiment) -> list[int]:
    """Return seeds with which modules run code that the first seed did not run; few, often none."""
    if not experiment.ran.decides:
        return []
    seen, found = _trace(experiment, 1), []
    for seed in range(2, 2 + _TRIED):
        trace = _trace(experiment, seed)
        if not trace <= seen:
            seen |= trace
            found.append(seed)
        if len(found) == _VERIFIED:
            break
    return found


def _trace(experiment: Experiment, seed: int) -> _Trace:
    """Run the loss of the whole batch, and return what ran."""
    replica = experiment.subject.replica()
    own: defaultdict[str, list[str]] = defaultdict(list)
    trace: _Trace = set()
    batch = experiment.rows.cut(0, experiment.rows.size)
    seed_all(seed)
    draws = Draws(experiment.rows.size)
    with replica.stage, experiment.running(draws, None) as numerics:
        ops = numerics.ops = []

        def flush(name: str) -> None:
            own[name] += ops
            ops.clear()

        def end(name: str, caller: str, _inputs: Any, output: Any) -> Any:
            flush(name)
            trace.add((name, hash(tuple(own.pop(name, ())))))
            own[caller].append(name)
            return output

        with module_hooks(replica.model, end, begin=flush, kept=_nothing):
            replica.loss(replica.model, batch)
        flush(LOSS)
    trace.add((LOSS, hash(tuple(own[LOSS]))))
    return trace


def _nothing(_: Any) -> tuple[Tensor, ...]:
    return ()
