"""Losses that take gradients themselves, with autograd or with the transforms of `torch.func`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from autobatch import check_equivalence
from tests.equivalence.networks import EXACT, found, kinds, network, samples

X, Y = samples()


def gradient_of(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    inputs = x.clone().requires_grad_()
    return torch.autograd.grad(model(inputs).square().sum(), inputs, **options)[0]


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    slopes = gradient_of(model, x, create_graph=True).norm(dim=1)
    return model(x).mean() + (slopes - 1).square().mean()


def adversarial(model: nn.Module, x: Tensor) -> Tensor:
    return model(x + 0.1 * gradient_of(model, x).sign()).square().mean()


def zeros_for_none(model: nn.Module, x: Tensor) -> Tensor:
    options = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    return model(x).square().mean() + gradient_of(model, x, **options).square().mean()


def per_sample(model: nn.Module, x: Tensor) -> Tensor:
    parameters = dict(model.named_parameters())

    def one(given: Any, row: Tensor) -> Tensor:
        return functional_call(model, given, (row[None],)).square().mean()

    fixed = {name: p.detach() for name, p in parameters.items()}
    slopes = vmap(grad(one), (None, 0))(fixed, x)
    return torch.stack([(s.mean(0) * parameters[n]).sum() for n, s in slopes.items()]).sum()


def tangent(model: nn.Module, x: Tensor) -> Tensor:
    return jvp(model, (x,), (torch.ones_like(x),))[1].square().mean() + model(x).square().mean()


LOSSES = (penalty, adversarial, zeros_for_none, per_sample, tangent)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of PyTorch itself
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_a_loss_that_takes_gradients_of_each_sample_is_equivalent(
    loss: Callable[[nn.Module, Any], Tensor],
) -> None:
    result = check_equivalence(network(), X, loss=loss)
    assert result.equivalent, str(result)
    assert result.difference < EXACT


def test_a_layer_across_samples_is_found_beside_a_gradient_of_the_loss() -> None:
    result = check_equivalence(network(nn.BatchNorm1d(8)), X, loss=penalty)
    assert found(result) == [("batchnorm", ("1",))]


def test_a_count_that_hides_in_a_gradient_of_the_loss_is_found() -> None:
    def masked(model: nn.Module, batch: Any) -> Tensor:
        slopes = gradient_of(model, batch["x"], create_graph=True).square().sum(1)
        return (slopes * batch["mask"]).sum() / batch["mask"].sum()

    result = check_equivalence(network(), {"x": X, "mask": torch.ones(16)}, loss=masked)
    assert found(result) == [("weight", ('batch["mask"].sum()',))]


def test_a_model_that_takes_gradients_is_equivalent() -> None:
    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = network()

        def forward(self, x: Tensor) -> Tensor:
            return -gradient_of(self.energy, x, create_graph=True)

    result = check_equivalence(Force(), X, loss=lambda m, x: m(x).square().mean())
    assert result.equivalent, str(result)


def test_a_transform_around_random_numbers_is_no_error() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        rows = vmap(lambda row: model(row[None])[0], randomness="different")(x)
        return rows.square().mean()

    result = check_equivalence(network(nn.Dropout(0.4)), X, loss=loss)
    assert set(kinds(result)) <= {"random"}
