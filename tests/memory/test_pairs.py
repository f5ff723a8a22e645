"""Samples that meet in a tensor are seen by its shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autobatch
from autobatch import GpuSpec
from autobatch.support.units import MIB


def contrasted(model: nn.Module, x: Tensor) -> Tensor:
    z = F.normalize(model(x).mean(1), dim=-1)
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z), device=z.device))


def compared_in_both_views(model: nn.Module, x: Tensor) -> Tensor:
    z = torch.cat([model(x).mean(1), model(-x).mean(1)])
    return (z @ z.T).logsumexp(1).mean()


def within_samples(model: nn.Module, x: Tensor) -> Tensor:
    z = model(x)
    return (z @ z.transpose(1, 2)).square().mean()


def far_apart(model: nn.Module, x: Tensor) -> Tensor:
    """From some size on, the kernel of distances takes another way."""
    z = model(x).mean(1)
    return torch.cdist(z, z).mean()


@pytest.mark.parametrize(
    ("loss", "is_paired"),
    [
        (contrasted, True),
        (compared_in_both_views, True),
        (far_apart, True),
        (within_samples, False),
    ],
)
def test_a_plan_that_accumulates_says_where_samples_are_compared(loss, is_paired: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    card = GpuSpec(name="card", capacity_bytes=32 * MIB)
    plan = autobatch.tune(
        model, target=256, sample=torch.randn(4, 64, 64), loss=loss, gpu=card, cache=False
    )
    assert plan.accumulation_steps > 1
    assert any("its micro-batch only" in warning for warning in plan.warnings) == is_paired
