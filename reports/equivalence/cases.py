"""The record of one case, and the small network that losses are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]

SAMPLES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, a batch and a loss.

    Attributes:
        name: its key in the results.
        is_equivalent: whether every window has the gradient of its batch, as the formula says.
        why: the reason, in a few words.
        build: makes the model, the batch and the loss.
        unequal: makes another batch of the same kind, whose samples have unequal counts; None
            where the batch itself shows all there is.
    """

    name: str
    is_equivalent: bool
    why: str
    build: Callable[[], tuple[nn.Module, Any, Loss]]
    unequal: Callable[[], Any] | None = None


def inputs(number: int = SAMPLES) -> Tensor:
    """Return inputs of the small network."""
    return torch.randn(number, 6, generator=torch.Generator().manual_seed(3))


def targets(number: int = SAMPLES) -> Tensor:
    """Return targets of the small network's shape of outputs."""
    return torch.randn(number, 3, generator=torch.Generator().manual_seed(4))


def classes(number: int = SAMPLES) -> Tensor:
    """Return one class of three for each sample."""
    return torch.arange(number) % 3


def network(*middle: nn.Module) -> nn.Sequential:
    """Return a small network of 6 inputs and 3 outputs."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.GELU(), nn.Linear(8, 3))
