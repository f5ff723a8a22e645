"""The efficiencies that fit the first half of the rows best, found one after the other.

What is made small is the mean of the logarithms of how far off each row is, each table weighing as
much as any other, and besides, a little, how far constants move from where they begin. The second
half is not looked at.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autobatch.gpus.roofline import EFFICIENCY, Efficiency
from autobatch.gpus.work import WindowWork
from reports.throughput.rows import Row
from reports.throughput.score import TRITON, scored

__all__ = ["Constants", "fitted"]

Rows = Sequence[tuple[Row, WindowWork]]

_STEPS = (0.8, 0.9, 0.96, 0.98, 1.02, 1.04, 1.1, 1.25)
_LARGEST = 0.95
_PULL = 0.02
_ROUNDS = 20
_LEAST_GAIN = 1e-5

_COMPUTE = (
    ("matmul", "ampere"),
    ("matmul", "half-rate"),
    ("matmul", "hopper"),
    ("convolution", "volta"),
    ("convolution", "ampere"),
    ("convolution", "half-rate"),
    ("convolution", "fp32"),
    ("grouped_convolution", ""),
    ("grouped_convolution", "fp32"),
    ("attention", "ampere"),
)
"""Shares of peak FLOP/s that rows tell of."""

_MEMORY = (
    ("convolution", "grouped_convolution"),
    ("depthwise_convolution",),
    ("conversion",),
    ("norm",),
    ("elementwise", "copy", "optimizer", "reduction"),
)
"""Kinds that share one figure of memory."""


@dataclass(frozen=True, slots=True)
class Constants:
    """What is fitted: the package's efficiencies, and that of MosaicML's attention."""

    efficiency: Efficiency = EFFICIENCY
    triton: Mapping[str, float] = field(default_factory=lambda: TRITON)

    def figures(self) -> dict[str, float]:
        """Return all that may move, by name."""
        compute, memory = self.efficiency.compute, self.efficiency.memory
        return {
            **{f"{kind} {family}": _share(compute, kind, family) for kind, family in _COMPUTE},
            **{kinds[0]: memory[kinds[0]] for kinds in _MEMORY},  # type: ignore[index]
            **{f"triton {family}": share for family, share in self.triton.items() if family},
        }


def fitted(rows: Rows) -> Constants:
    """Return the constants that fit the rows."""
    best = Constants()
    loss = _loss(best, rows)
    for _ in range(_ROUNDS):
        before = loss
        for move in _moves():
            for step in _STEPS:
                candidate = move(best, step)
                found = _loss(candidate, rows)
                if found < loss:
                    best, loss = candidate, found
        if before - loss < _LEAST_GAIN:
            break
    return best


def _moves() -> Iterator[Callable[[Constants, float], Constants]]:
    """Yield what multiplies one constant by a factor."""

    def of_compute(kind: str, family: str) -> Callable[[Constants, float], Constants]:
        def move(now: Constants, step: float) -> Constants:
            compute: dict[Any, Mapping[str, float]] = dict(now.efficiency.compute)
            share = _rounded(_share(compute, kind, family) * step)
            compute[kind] = {**compute[kind], family: share}
            return replace(now, efficiency=replace(now.efficiency, compute=compute))

        return move

    def of_memory(kinds: Sequence[str]) -> Callable[[Constants, float], Constants]:
        def move(now: Constants, step: float) -> Constants:
            memory: dict[Any, float] = dict(now.efficiency.memory)
            memory.update({kind: _rounded(memory[kind] * step) for kind in kinds})
            return replace(now, efficiency=replace(now.efficiency, memory=memory))

        return move

    def of_triton(family: str) -> Callable[[Constants, float], Constants]:
        def move(now: Constants, step: float) -> Constants:
            share = _rounded(now.triton[family] * step)
            return replace(now, triton={**now.triton, family: share})

        return move

    yield from (of_compute(kind, family) for kind, family in _COMPUTE)
    yield from map(of_memory, _MEMORY)
    yield from (of_triton(family) for family in TRITON if family)


def _share(compute: Mapping[Any, Mapping[str, float]], kind: str, family: str) -> float:
    return compute[kind].get(family, compute[kind][""])


def _rounded(share: float) -> float:
    return round(min(share, _LARGEST), 3)


def _loss(constants: Constants, rows: Rows) -> float:
    tables = Counter(row.table for row, _ in rows)
    errors = (
        abs(math.log(scored(row, work, constants.efficiency, constants.triton).ratio))
        / tables[row.table]
        for row, work in rows
    )
    begun = Constants().figures()
    pull = sum(abs(math.log(now / begun[name])) for name, now in constants.figures().items())
    return sum(errors) / len(tables) + _PULL * pull / len(begun)
