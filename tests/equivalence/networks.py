"""Small networks, batches and losses that the tests of the check share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autobatch.equivalence.result import Equivalence

EXACT = 1e-12


def samples(number: int = 16) -> tuple[Tensor, Tensor]:
    """Return inputs of 6 values and targets of 3."""
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(number, 6, generator=generator),
        torch.randn(number, 3, generator=generator),
    )


def network(*middle: nn.Module) -> nn.Sequential:
    """Return a network for `samples`, with other modules in its middle."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.GELU(), nn.Linear(8, 3))


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    """Return a mean over all samples."""
    return (model(batch[0]) - batch[1]).square().mean()


def kinds(result: Equivalence) -> list[str]:
    """Return the kinds of the culprits."""
    return [culprit.kind for culprit in result.culprits]


def found(result: Equivalence) -> list[tuple[str, tuple[str, ...]]]:
    """Return kind and place of the culprits."""
    return [(culprit.kind, culprit.where) for culprit in result.culprits]
