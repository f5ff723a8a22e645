"""How far gradients are apart, also where they are not finite or not real."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from autobatch import check_equivalence
from autobatch.equivalence.gradients import Measured, differences, largest_of
from tests.equivalence.networks import EXACT, found, samples


def test_gradients_that_are_not_finite_are_infinitely_far_apart() -> None:
    good, bad = {"w": torch.ones(2)}, {"w": torch.tensor([1.0, math.nan])}
    zero = {"w": torch.ones(2), "b": torch.zeros(1)}
    for one, other in ((good, bad), (bad, good), (bad, bad), ({**bad, "b": zero["b"]}, zero)):
        assert set(differences(one, [other], [1.0]).values()) == {math.inf}
    assert differences(zero, [zero], [1.0]) == {"w": 0.0, "b": 0.0}


def test_complex_gradients_are_compared_in_both_parts() -> None:
    one = torch.tensor([3 + 4j, 1, 2j, 1 + 1j])
    assert largest_of(one) == 5
    assert differences({"w": one}, [{"w": one.conj()}], [1.0])["w"] > 1
    halves = Measured(whole={"w": one}, parts=[{"w": one * 2}])
    assert abs(halves.fitted()[0] - 0.5) < EXACT


class Spectral(nn.Module):
    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.middle = nn.Sequential(*middle)
        self.weights = nn.Parameter(torch.randn(6, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.middle(x).to(self.weights.dtype) @ self.weights).abs()


def test_complex_parameters_are_compared_in_double_precision() -> None:
    x, y = samples()

    def loss(model, batch):
        return (model(batch["x"]) - batch["y"])[batch["y"] > -100].square().mean()

    result = check_equivalence(Spectral(), (x, y), loss=lambda m, b: (m(b[0]) - b[1]).abs().mean())
    assert result.equivalent and result.difference < EXACT and result.dtype == "float64"
    counted = check_equivalence(Spectral(), {"x": x, "y": y}, loss=loss)
    assert found(counted) == [("weight", ('(batch["y"] > -100).sum()',))]
    mixing = check_equivalence(
        Spectral(nn.BatchNorm1d(6)), (x, y), loss=lambda m, b: (m(b[0]) - b[1]).square().mean()
    )
    assert found(mixing) == [("batchnorm", ("middle.0",))]
