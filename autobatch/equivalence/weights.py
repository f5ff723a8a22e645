"""The weights that micro-batches may need: counts of what the batch holds, tried one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.equivalence.gradients import Gradients
from autobatch.workload.sample import named_tensors

__all__ = ["IGNORED", "SUM", "fitted_weights", "shares", "tried_weights"]

SUM = "1"
"""The weight expression of a loss that is a sum, so that micro-batches are added unweighted."""

IGNORED = -100
"""The label that losses ignore, PyTorch's default for `ignore_index`."""

_ENTRIES_FITTED = 100_000


def shares(weights: Sequence[float]) -> list[float]:
    """Return each micro-batch's share of the window's weight."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def tried_weights(pieces: Sequence[Any]) -> Iterator[tuple[str, list[float]]]:
    """Yield possible weights of the micro-batches, each as an expression and their shares.

    The likeliest come first: labels that are not ignored, unshifted and shifted as in language
    models; then entries that are not zero (padding); then sums, such as those of lengths.
    """
    tensors = [named_tensors(piece) for piece in pieces]
    counts = (_labels, _shifted_labels, _entries, _total)
    for count in counts:
        for path, first in tensors[0].items():
            if not first.dim():
                continue
            found = [count(piece[path]) for piece in tensors]
            expressions, values = {text for text, _ in found}, [value for _, value in found]
            if len(expressions) == 1 and min(values) >= 0 < sum(values):
                yield expressions.pop().format(_written(path)), shares(values)
    yield SUM, [1.0] * len(pieces)


def _labels(tensor: Tensor) -> tuple[str, float]:
    return f"({{}} != {IGNORED}).sum()", float((tensor != IGNORED).sum())


def _shifted_labels(tensor: Tensor) -> tuple[str, float]:
    if tensor.dim() < 2:
        return _labels(tensor)
    return f"({{}}[:, 1:] != {IGNORED}).sum()", float((tensor[:, 1:] != IGNORED).sum())


def _entries(tensor: Tensor) -> tuple[str, float]:
    return "({} != 0).sum()", float((tensor != 0).sum())


def _total(tensor: Tensor) -> tuple[str, float]:
    return "{}.sum()", float(tensor.double().sum())


def _written(path: Sequence[str]) -> str:
    keys = (key if key.isdecimal() else f'"{key}"' for key in path)
    return "batch" + "".join(f"[{key}]" for key in keys)


def fitted_weights(whole: Gradients, parts: Sequence[Gradients]) -> list[float]:
    """Return the weights that bring the window's gradient closest to that of the batch.

    They are fitted by least squares over some of the entries. Zeros where the entries are too few
    for the number of micro-batches, because those would fit by chance.
    """
    entries = torch.stack([_some(part) for part in parts], dim=1)
    if len(entries) < 8 * len(parts):
        return [0.0] * len(parts)
    return [float(w) for w in torch.linalg.lstsq(entries, _some(whole)[:, None]).solution[:, 0]]


def _some(gradients: Gradients) -> Tensor:
    flat = torch.cat([gradient.flatten() for gradient in gradients.values()]).double()
    return flat[:: len(flat) // _ENTRIES_FITTED + 1]
