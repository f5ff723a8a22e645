"""Gradients that are clipped inside of the graph are clipped at their size in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autobatch
from autobatch import check_equivalence
from tests.equivalence.networks import EXACT, found, network

LIMIT = 0.02
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(24) % 3


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-LIMIT, LIMIT)


def hooked(outputs: Tensor) -> Tensor:
    if outputs.requires_grad:
        outputs.register_hook(lambda gradient: gradient.clamp(-LIMIT, LIMIT))
    return outputs


def normalised(outputs: Tensor) -> Tensor:
    if outputs.requires_grad:
        outputs.register_hook(lambda gradient: gradient / gradient.norm())
    return outputs


class Inside(nn.Module):
    """Clips the gradient of an activation, as recurrent networks do."""

    def __init__(self, clip: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.clip, self.body = clip, network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body[2](self.clip(self.body[1](self.body[0](x))))


def plain(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("clip", [Clamp.apply, hooked], ids=["function", "hook"])
@pytest.mark.parametrize("place", ["loss", "model"])
def test_an_entry_that_is_clipped_by_itself_is_as_in_training(
    place: str, clip: Callable[[Tensor], Tensor]
) -> None:
    def clipped(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(clip(model(batch[0])), batch[1])

    model, loss = (network(), clipped) if place == "loss" else (Inside(clip), plain)
    result = check_equivalence(model, (X, Y), loss=loss, micro_batch=6, accumulation_steps=4)
    assert result.equivalent, str(result)
    assert result.difference < EXACT


def test_the_verdict_is_that_of_windows() -> None:
    model = Inside(hooked).double()
    x = X.double()
    plain(model, (x, Y)).backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    bound = max(float(gradient.abs().max()) for gradient in whole)
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    loader = [(x[i : i + 6], Y[i : i + 6]) for i in range(0, 24, 6)]
    for window in autobatch.windows(loader, optimizer, micro_batch=6, accumulation_steps=4):
        for batch in window:
            window.backward(plain(model, batch))
        added = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        window.step()
    apart = max(float((a - b).abs().max()) for a, b in zip(added, whole, strict=True))
    assert apart < EXACT * bound


def test_a_gradient_that_is_normalised_over_a_micro_batch_is_not_equivalent() -> None:
    result = check_equivalence(Inside(normalised), (X, Y), loss=plain)
    assert result.equivalent is False


def test_clipping_hides_no_batch_norm() -> None:
    def clipped(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(hooked(model(batch[0])), batch[1])

    result = check_equivalence(network(nn.BatchNorm1d(8)), (X, Y), loss=clipped)
    assert ("batchnorm", ("1",)) in found(result)


def test_a_first_micro_batch_that_counts_for_nothing_is_no_error_beside_hooks() -> None:
    def weighted(model: nn.Module, batch: Any) -> Tensor:
        each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (each * batch[2]).sum() / batch[2].sum().clamp(min=1e-9)

    model = network()
    model[0].weight.register_hook(lambda gradient: 2 * gradient)
    batch = (X, Y, (torch.arange(24) >= 6).double())
    result = check_equivalence(
        model,
        batch,
        loss=weighted,
        weight=lambda part: float(part[2].sum()),
        micro_batch=6,
        accumulation_steps=4,
    )
    assert result.equivalent, str(result)
