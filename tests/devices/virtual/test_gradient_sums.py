"""Gradients that meet are added in place where the real engine does so."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

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
