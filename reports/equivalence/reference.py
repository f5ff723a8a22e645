"""The same question without autobatch: gradients that plain PyTorch adds up, in float64.

Dropout is off here, because two runs would draw other numbers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.workload.sample import rows_of
from autobatch.workload.tree import map_tensors
from reports.equivalence.cases import Case

__all__ = ["reference"]

_WINDOW = (3, 2)


def reference(case: Case) -> float | None:
    """Return the largest difference, of the case's batch or of its unequal one.

    None where plain PyTorch does not run in float64, where hooks take the gradients away, and where
    two seeds give two gradients of one batch.
    """
    _, batch, _ = case.build()
    batches = [batch] if case.unequal is None else [batch, case.unequal()]
    try:
        found = [_difference(case, map_tensors(_double, one)) for one in batches]
    except RuntimeError:
        return None
    known = [each for each in found if each is not None]
    return max(known) if len(known) == len(found) else None


def _difference(case: Case, batch: Any) -> float | None:
    rows = rows_of(batch)
    total, start = sum(_WINDOW), 0
    everything = [(rows.cut(0, total), 1.0)]
    whole = _gradients(case, everything)
    if not whole or _apart(whole, _gradients(case, everything, seed=1)):
        return None
    parts = []
    for size in _WINDOW:
        parts.append((rows.cut(start, start + size), size / total))
        start += size
    return _apart(whole, _gradients(case, parts))


def _apart(whole: Sequence[Tensor], window: Sequence[Tensor]) -> float:
    sizes = [float(g.abs().max()) for g in whole]
    floor = 1e-3 * max(sizes)
    triples = zip(whole, window, sizes, strict=True)
    return max(float((a - b).abs().max()) / max(size, floor) for a, b, size in triples)


def _gradients(case: Case, parts: Sequence[tuple[Any, float]], seed: int = 0) -> list[Tensor]:
    model, _, loss = case.build()
    model.double().train()
    owned = loss.double() if isinstance(loss, nn.Module) else nn.Module()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for batch, weight in parts:
        torch.manual_seed(seed)
        random.seed(seed)
        (loss(model, batch) * weight).backward()
    every = [*model.parameters(), *owned.parameters()]
    learned = [p for p in every if p.requires_grad]
    if all(p.grad is None for p in learned):
        return []
    return [torch.zeros_like(p) if p.grad is None else _dense(p.grad) for p in learned]


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
