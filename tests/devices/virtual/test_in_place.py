"""Gradients that meet are added in place where the real engine does so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from autobatch.devices.virtual.in_place import holders_of_a_sum
from tests.support.simulated import (
    NARROW,
    NARROW_BYTES,
    SAMPLES,
    made_by,
)


class Branches(nn.Module):
    """Gradients that meet: some the engine may add in place, some it may not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(NARROW, NARROW), nn.Linear(NARROW, NARROW)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.second(x)  # the skipped gradient is free again when the other one comes
        x = x + torch.tanh(x)
        x = x.exp() + x.sigmoid()
        x = x + x.view(-1, NARROW)  # one gradient, shared by both branches
        return x + x.t().reshape(-1, NARROW)


def test_gradients_are_summed_in_place_where_the_real_engine_does_it():
    model = Branches()
    loss = model(torch.zeros(SAMPLES, NARROW)).sum()
    # torch 2.10 and 2.11 warn without acc_events that another cycle would clear the events
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        loss.backward()
    real = [event.name for event in profiled.events()]
    assert real.count("aten::add_") >= 3
    assert real.count("aten::add") >= 1
    assert len(made_by(model, "aten::add.Tensor")) == real.count("aten::add")


class SumOfTemporaries(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        kept = gradient * 3
        total = kept + gradient * 4
        return F.relu(total) + kept


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(NARROW, NARROW)

    def forward(self, x: Tensor) -> Tensor:
        return SumOfTemporaries.apply(self.first(x))


def test_sums_in_a_users_own_backward_take_memory():
    assert made_by(Custom(), "aten::add.Tensor") == [NARROW_BYTES, NARROW_BYTES]


class LaterBias(nn.Module):
    """Linear layers whose input is not contiguous, so that the bias is added to the product."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.weight = (
            nn.Linear(NARROW, NARROW),
            nn.Parameter(torch.zeros(NARROW, NARROW)),
        )

    def forward(self, x: Tensor) -> Tensor:
        turned = x.unsqueeze(0).expand(2, -1, -1).transpose(0, 1)
        first = self.layer(turned)
        return (first.transpose(0, 1) @ self.weight) + self.layer.bias  # this one is the user's


def test_a_linear_layer_adds_its_bias_in_place_and_a_sum_of_the_users_does_not():
    assert made_by(LaterBias(), "aten::add.Tensor", "forward") == [2 * NARROW_BYTES]


class Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(8, NARROW))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table[torch.zeros(len(x), dtype=torch.long, device=x.device)]
        return (
            x
            * rows
            * self.table.gather(0, torch.zeros(1, NARROW, dtype=torch.long, device=x.device))
        )


def test_gradients_of_indexed_tensors_are_put_into_zeros():
    assert made_by(Indexed(), "aten::index_put") == []
    assert made_by(Indexed(), "aten::scatter_add") == []
    assert made_by(Indexed(), "zeros") == [8 * NARROW * 4] * 2


def test_a_masked_score_is_the_score():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(NARROW, NARROW)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)[None, None]
            mask = torch.zeros(x.shape[2], x.shape[2], device=x.device)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    assert made_by(Attention(), "aten::add.Tensor", "forward") == []


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autograd.set_detect_anomaly(True),
        lambda: torch.autograd.graph.saved_tensors_hooks(Tensor.numpy, torch.from_numpy),
    ],
    ids=["anomalies", "hooks"],
)
def test_how_the_engine_sums_is_seen_whatever_the_user_has_set(around):
    expected = holders_of_a_sum()
    holders_of_a_sum.cache_clear()
    with around():
        assert holders_of_a_sum() == expected
