"""Random numbers: micro-batches get their rows of what the whole batch drew."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autobatch import check_equivalence
from autobatch.equivalence.draws import rows_of
from tests.equivalence.networks import EXACT, kinds, mean_square, network, samples


class Gumbel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.gumbel_softmax(x, hard=True)


class OwnNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * x.std(1, keepdim=True)


class MaskOfEach(nn.Module):
    """Draws a mask for one sample after the other, by NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones_like(x)
        for row in mask:
            row[np.random.randint(0, 8, 2)] = 0
        return x * mask


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return result


@pytest.mark.parametrize(
    "module",
    [Gumbel(), OwnNoise(), MaskOfEach(), Checkpointed(), nn.AlphaDropout(0.3), nn.Dropout1d(0.3)],
    ids=lambda module: type(module).__name__,
)
def test_draws_of_each_sample_alone_are_no_difference(module: nn.Module) -> None:
    result = check_equivalence(network(module), samples(), loss=mean_square)
    assert result.equivalent, str(result)
    assert kinds(result) == ["random"]
    assert result.difference > 1e-3


class Branch(nn.Module):
    """Runs a BatchNorm for some draws only."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        drawn = {
            "torch": lambda: torch.rand(()).item(),
            "python": random.random,
            "numpy": np.random.rand,
        }[self.source]()
        return self.norm(x) if drawn < 0.2 else x


@pytest.mark.parametrize("source", ["torch", "python", "numpy"])
def test_a_branch_that_is_seldom_taken_is_found(source: str) -> None:
    result = check_equivalence(network(Branch(source)), samples(), loss=mean_square)
    assert not result.equivalent
    assert kinds(result) == ["random", "batchnorm"]


class BranchOfCode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if random.random() < 0.3 else x


class NoiseOfStatistic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * x.std(0)


class ProbabilityOfMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.sigmoid(x.mean(0)).detach().expand_as(x))


class Mixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x[torch.randperm(len(x))]


@pytest.mark.parametrize(
    "module",
    [BranchOfCode(), NoiseOfStatistic(), ProbabilityOfMean(), Mixed()],
    ids=lambda module: type(module).__name__,
)
def test_a_draw_hides_no_mixing(module: nn.Module) -> None:
    result = check_equivalence(network(module), samples(), loss=mean_square)
    assert result.equivalent is False
    assert set(kinds(result)) > {"random"}


def test_draws_that_cannot_be_given_by_sample_leave_it_undecided() -> None:
    class Masks(nn.Module):
        """Draws once for all samples, then for each, as SpecAugment does."""

        def forward(self, x: Tensor) -> Tensor:
            number, mask = 1 + int(np.random.rand() < 0.5), torch.ones_like(x)
            for row in mask:
                row[np.random.randint(0, 8, number)] = 0
            return x * mask

    result = check_equivalence(network(Masks()), samples(), loss=mean_square)
    assert result.equivalent is None
    assert kinds(result) == ["random", "undecided"]
    assert str(result).startswith("undecided")


def test_what_the_loss_draws_is_given_by_sample_too() -> None:
    def denoising(model: nn.Module, batch: Any) -> Tensor:
        noise = torch.randn_like(batch[1])
        return (model(batch[0] + noise.repeat(1, 2)) - noise).square().mean()

    def weighted(model: nn.Module, batch: Any) -> Tensor:
        weights = torch.rand(len(batch[0])).to(batch[0])
        each = (model(batch[0]) - batch[1]).square().mean(1)
        return (each * weights).sum() / weights.sum()

    assert check_equivalence(network(), samples(), loss=denoising).held_difference < EXACT
    result = check_equivalence(network(), samples(), loss=weighted)
    assert result.equivalent is False
    assert kinds(result) == ["random", "weight"]


def test_rows_are_given_only_where_the_shapes_name_them() -> None:
    drawn = torch.arange(12).reshape(6, 2)
    assert rows_of(drawn, (2, 2), (1, 2), 3).tolist() == [[4, 5], [6, 7]]  # two rows a sample
    assert rows_of(drawn, (6, 2), (1, 2), 3) is drawn
    assert rows_of(drawn, (3, 2), (1, 2), 3) is None
    assert rows_of(drawn, (2,), (1, 2), 3) is None
