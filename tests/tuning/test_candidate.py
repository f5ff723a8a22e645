"""Candidates of an advice: odd workloads have the plan, the memory and the time of `tune`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autobatch
from autobatch.records.codec import decode, encode


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def test_an_optimizer_in_the_backward_pass_has_a_time() -> None:
    sample = torch.randn(4, 256), torch.randint(10, (4,))
    advice = autobatch.advise(layers(), target=64, gpu="t4", levers=["optimizer"], sample=sample)
    [found] = [c for c in advice.choices if c.label == "optimizer: in backward"]
    assert found.fits and found.accumulation_steps == 1
    assert found.window_seconds is not None
    assert 0 < found.window_seconds < 2 * (advice.as_it_is.window_seconds or 0)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(64, 64)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        scores = self.map(one) @ self.map(other).t()
        return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


@pytest.mark.parametrize("gpu", ["t4", "a100-40gb"])
def test_a_loss_over_the_whole_batch_has_the_ceiling_of_tune(gpu: str) -> None:
    asked = {"target": 256, "gpu": gpu, "sample": (torch.randn(4, 64), torch.randn(4, 64))}
    plan = autobatch.tune(Pairs(), **asked)
    advice = autobatch.advise(Pairs(), levers=["precision"], **asked)
    assert advice.as_it_is.ceiling == plan.ceiling_at_least
    assert advice.as_it_is.is_ceiling == (plan.ceiling is not None)


class Whimsical(nn.Module):
    """Runs other calls at every micro-batch, so that sizes are executed one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(len(x) % 3):
            x = torch.tanh(self.map(x))
        return self.map(x)


def test_a_ceiling_that_was_not_looked_for_to_the_end_is_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autobatch.tuning.ceiling.SECONDS_BEYOND", 0.01)
    advice = autobatch.advise(
        Whimsical(), target=8, gpu="t4", levers=["precision"], sample=torch.zeros(2, 64)
    )
    assert not advice.as_it_is.is_ceiling
    shown = f"{advice.as_it_is.ceiling:,}+"
    assert shown in str(advice) and "Above a ceiling with +" in str(advice)
    assert decode(type(advice), encode(advice)) == advice
