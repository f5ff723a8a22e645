"""Verdicts are those of exact arithmetic; rounding is measured, not assumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autobatch import check_equivalence
from tests.equivalence.networks import mean_square, network, samples


def masked(model: nn.Module, batch: Any) -> Tensor:
    each = model(batch["x"]).square()[..., 0]
    return (each * batch["mask"]).sum() / batch["mask"].sum()


@pytest.mark.parametrize(
    ("missing", "options"), [(10, {"autocast": "bf16"}), (2, {"dtype": torch.float32})]
)
def test_a_small_systematic_difference_is_not_taken_for_rounding(
    missing: int, options: dict[str, Any]
) -> None:
    mask = torch.ones(16, 40)
    mask[0, :missing] = 0
    batch = {"x": torch.randn(16, 40, 6, generator=torch.Generator().manual_seed(1)), "mask": mask}
    result = check_equivalence(network(), batch, loss=masked, **options)
    assert not result.equivalent
    assert 1e-4 < result.held_difference < 5e-2
    assert [each.where for each in result.culprits] == [('batch["mask"].sum()',)]


def test_what_float32_rounds_is_measured() -> None:
    result = check_equivalence(network(), samples(), loss=mean_square, dtype=torch.float32)
    assert result.equivalent
    assert result.dtype == "float32"
    assert result.difference < result.tolerance < 1e-3


def test_a_large_model_is_compared_on_five_samples_and_says_so() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 1000), nn.BatchNorm1d(1000), nn.Linear(1000, 1100))
    batch = torch.randn(16, 6)
    result = check_equivalence(model, batch, loss=lambda m, b: m(b).square().mean(), micro_batch=8)
    assert [each.window for each in result.comparisons] == [(3, 2)]
    assert "3 + 2 samples were compared in place of 8 + 8" in result.notes[0]
    assert [each.kind for each in result.culprits] == ["batchnorm"]
    model[1] = nn.Dropout(0.2)
    result = check_equivalence(model, batch, loss=lambda m, b: m(b).square().mean())
    assert result.equivalent
    assert result.dtype == "float64"
    assert [each.kind for each in result.culprits] == ["random"]
