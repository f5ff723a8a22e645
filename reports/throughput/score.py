"""How far estimates are from what was published, and whether they order it rightly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median
from types import MappingProxyType
from typing import Any

from autobatch.gpus.roofline import EFFICIENCY, Efficiency, estimate
from autobatch.gpus.work import WindowWork
from reports.throughput.rows import Row

__all__ = ["TRITON", "Scored", "in_order", "percentile", "scored", "spearman", "summary"]

TRITON: Mapping[str, float] = MappingProxyType({"": 0.3, "ampere": 0.33, "hopper": 0.18})
"""By family of cards: the share of peak FLOP/s of the attention that MosaicML's rows ran, a kernel
in Triton of 2023 which PyTorch does not have; fitted to those rows alone."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A row with its estimate.

    Attributes:
        row: what was published.
        samples_per_second: of one card, estimated.
        bound: what most of the window goes to.
    """

    row: Row
    samples_per_second: float
    bound: str

    @property
    def rate(self) -> float:
        """What a card does in a second, estimated, in the published unit: images or tokens."""
        return self.samples_per_second * _units_a_sample(self.row)

    @property
    def published(self) -> float:
        """The same as published."""
        return self.row.samples_per_second * _units_a_sample(self.row)

    @property
    def ratio(self) -> float:
        """Estimated throughput against the published one."""
        return self.samples_per_second / self.row.samples_per_second

    @property
    def error(self) -> float:
        """How far off, as a factor less one: 0.25 for 1.25 times too fast or too slow."""
        return math.exp(abs(math.log(self.ratio))) - 1


def _units_a_sample(row: Row) -> int:
    return row.size if row.unit == "tokens/s" else 1


def scored(
    row: Row,
    work: WindowWork,
    efficiency: Efficiency = EFFICIENCY,
    triton: Mapping[str, float] = TRITON,
) -> Scored:
    """Estimate a row's throughput from its work."""
    if row.table.startswith("mosaicml"):
        efficiency = replace(efficiency, compute={**efficiency.compute, "attention": triton})
    found = estimate(
        work,
        row.card,
        accumulation_steps=row.accumulation,
        world_size=row.world_size,
        efficiency=efficiency,
    )
    assert found is not None  # every card here has its figures
    return Scored(row, found.samples / found.seconds, found.bound)


def summary(rows: Sequence[Scored]) -> dict[str, Any]:
    """Return the errors of rows, and whether their order is the published one.

    Those of one table are ranked by what they do in a second. Images and tokens are ranked
    together by samples.
    """
    errors = sorted(one.error for one in rows)
    is_one_unit = len({one.row.unit == "tokens/s" for one in rows}) == 1
    pairs = [
        (one.rate, one.published)
        if is_one_unit
        else (one.samples_per_second, one.row.samples_per_second)
        for one in rows
    ]
    return {
        "rows": len(rows),
        "median": median(errors),
        "p90": percentile(errors, 0.9),
        "worst": errors[-1],
        "ratio": median(one.ratio for one in rows),
        "spearman": spearman(*zip(*pairs, strict=True)),
    }


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that so large a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


def in_order(rows: Sequence[Scored], least: float = 0.03) -> tuple[int, int]:
    """Return how many pairs of rows are in the published order, and how many pairs there are.

    Pairs whose published figures are less than a share apart are left out.
    """
    right = pairs = 0
    for one, other in combinations(rows, 2):
        published = one.published / other.published
        if abs(math.log(published)) < math.log1p(least):
            continue
        pairs += 1
        right += (published > 1) == (one.rate > other.rate)
    return right, pairs


def spearman(first: Iterable[float], second: Iterable[float]) -> float | None:
    """Return Spearman's rank correlation; None for fewer than three pairs, or where all are equal.

    >>> spearman([1, 2, 3, 4], [10, 20, 40, 30])
    0.8
    """
    ranks = [_ranks(list(values)) for values in (first, second)]
    count = len(ranks[0])
    if count < 3:
        return None
    middle = (count - 1) / 2
    products = [
        sum((one - middle) * (other - middle) for one, other in zip(a, b, strict=True))
        for a, b in ((ranks[0], ranks[1]), (ranks[0], ranks[0]), (ranks[1], ranks[1]))
    ]
    if not products[1] or not products[2]:
        return None
    return round(products[0] / math.sqrt(products[1] * products[2]), 6)


def _ranks(values: list[float]) -> list[float]:
    """Return ranks from 0; those of equal values are their mean."""
    places = sorted(values)
    return [places.index(value) + (places.count(value) - 1) / 2 for value in values]
