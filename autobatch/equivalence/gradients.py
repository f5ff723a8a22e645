"""Gradients of whole batches and of micro-batches, and how far apart they are.

Invariant: a verdict is computed over all entries, one tensor after the other. Experiments look at
some entries of each tensor, always the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "TOLERANCES",
    "Gradients",
    "Measured",
    "Weigh",
    "apart",
    "differences",
    "divided",
    "is_continuous",
    "largest_of",
    "some",
    "total",
]

Gradients = Mapping[str, Tensor]
Weigh = Callable[[Any], float]

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
"""What rounding explains; in float32 it is measured, and this is the most that is believed."""

_SMALL = 1e-3
"""Gradients below this share of the model's largest one are compared with that share instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The gradient of a whole batch, and those of its micro-batches.

    Attributes:
        whole: of the batch, by name.
        parts: of each micro-batch, not weighted; a name that a part lacks is zero there.
        small: the share of the largest gradient below which one is compared with that share.
    """

    whole: Gradients
    parts: Sequence[Gradients]
    small: float = _SMALL
    _known: dict[tuple[float, ...], dict[str, float]] = field(default_factory=dict)

    def apart(self, weights: Sequence[float]) -> float:
        """Return the largest difference between the batch and the weighted micro-batches."""
        return max(self.differences(weights).values(), default=0.0)

    def differences(self, weights: Sequence[float]) -> dict[str, float]:
        """Return the difference of each tensor's gradient, as `Comparison` defines it."""
        key = tuple(weights)
        if key not in self._known:
            self._known[key] = differences(self.whole, self.parts, weights, self.small)
        return self._known[key]

    def fitted(self) -> list[float]:
        """Return the weights that bring the micro-batches closest to the batch, by least squares.

        Zeros where a micro-batch has fewer than two entries to fit its weight to, because one
        always fits, and where an entry is not finite.
        """
        entries = torch.stack([_column(self.whole, part) for part in self.parts], dim=1)
        is_few = len(entries) < 2 * len(self.parts) or int((entries != 0).sum(0).min()) < 2
        if is_few or not bool(entries.isfinite().all()):
            return [0.0] * len(self.parts)
        target = _column(self.whole, self.whole)[:, None]
        return [float(w) for w in torch.linalg.lstsq(entries, target).solution[:, 0]]

    def sampled(self) -> Measured:
        """Return the same with some of the entries."""
        parts = [some(part) for part in self.parts]
        return Measured(whole=some(self.whole), parts=parts, small=self.small)


def differences(
    whole: Gradients, parts: Sequence[Gradients], weights: Sequence[float], small: float = _SMALL
) -> dict[str, float]:
    """Return the relative difference of each tensor between a gradient and a weighted sum.

    It is infinite where one of them has an entry that is not finite, or where any of the whole has:
    there is no largest gradient then that says how small a difference is.

    >>> one = {"weight": torch.ones(2)}
    >>> differences(one, [one, one], [0.25, 0.25])
    {'weight': 0.5}
    """
    names = list(dict.fromkeys([*whole, *(name for part in parts for name in part)]))
    sizes = {name: largest_of(whole[name]) if name in whole else 0.0 for name in names}
    if not all(map(math.isfinite, sizes.values())):
        return dict.fromkeys(names, math.inf)
    floor = max(small * max(sizes.values(), default=0.0), torch.finfo(torch.float64).tiny)
    found = {}
    for name in names:
        known = [(part[name], w) for part, w in zip(parts, weights, strict=True) if name in part]
        rest = whole[name].clone() if name in whole else torch.zeros_like(known[0][0])
        for gradient, weight in known:
            rest.sub_(gradient, alpha=weight)
        apart = largest_of(rest)
        found[name] = apart / max(sizes[name], floor) if math.isfinite(apart) else math.inf
    return found


_ENTRIES = 4096
"""Entries of a tensor that experiments look at."""


def some(gradients: Gradients) -> Gradients:
    """Return some entries of each tensor: all of small ones, evenly spaced ones of others."""
    return {name: g.reshape(-1)[:: -(-g.numel() // _ENTRIES) or 1] for name, g in gradients.items()}


def total(parts: Sequence[Gradients], weights: Sequence[float]) -> Gradients:
    """Return a weighted sum of gradients."""
    sums: dict[str, Tensor] = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, gradient in part.items():
            sums[name] = sums[name] + gradient * weight if name in sums else gradient * weight
    return sums


def divided(gradients: Gradients, divisor: float) -> Gradients:
    """Return gradients divided by what their backward pass began with."""
    return {name: gradient / divisor for name, gradient in gradients.items()}


def apart(one: Gradients, other: Gradients) -> float:
    """Return the largest relative difference of two gradients, of some of their entries."""
    return max(differences(some(one), [some(other)], [1.0]).values(), default=0.0)


def is_continuous(tensor: Tensor) -> bool:
    """Say whether a tensor holds floating-point numbers, real or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def largest_of(gradient: Tensor) -> float:
    """Return the largest absolute entry; NaN where there is one."""
    if not gradient.numel():
        return 0.0
    if gradient.is_complex():
        return float(gradient.detach().abs().max())
    low, high = torch.aminmax(gradient.detach())
    return max(-float(low), float(high)) if low == low else float("nan")


def _column(whole: Gradients, part: Gradients) -> Tensor:
    """Return some entries of a gradient in one row, at the places of those of the whole batch's."""
    zeros = {name: torch.zeros((), dtype=g.dtype).expand(g.shape) for name, g in whole.items()}
    placed = some({name: part.get(name, zero) for name, zero in zeros.items()})
    rows = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in placed.values()]
    return torch.cat([row.flatten().double() for row in rows])
