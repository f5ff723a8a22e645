from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autobatch.errors import UsageError
from autobatch.plan.plan import Plan
from autobatch.records.split import split
from tests.support.plans import example_plan, ragged_plan

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


@pytest.fixture(autouse=True)
def _no_state_of_an_earlier_accelerator() -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def plan_for(target: int, ceiling: int) -> Plan:
    plan = ragged_plan(target, ((1,),), autocast=None, clip_norm=None)
    return replace(plan, split=split(target, ceiling=ceiling), ceiling_at_least=ceiling)


def updates(plan: Plan, epochs: int, samples: int) -> tuple[list[int], list[float]]:
    """Train in the way of Accelerate's guide; return samples and weight after each update."""
    settings = plan.to_accelerate()
    accelerator = accelerate.Accelerator(cpu=True, **settings.accelerator)
    data = TensorDataset(torch.arange(float(samples)).view(-1, 1) / samples)
    loader = DataLoader(data, **settings.dataloader)
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    model, sgd, loader = accelerator.prepare(model, sgd, loader)
    waiting, counts, weights = 0, [], []
    for _ in range(epochs):
        for (inputs,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.mse_loss(model(inputs), torch.ones_like(inputs)))
                sgd.step()
                sgd.zero_grad()
            waiting += len(inputs)
            if accelerator.sync_gradients:
                counts.append(waiting)
                weights.append(float(accelerator.unwrap_model(model).weight.detach()))
                waiting = 0
    return counts, weights


def test_every_update_gets_exactly_the_target_over_the_ends_of_epochs_too() -> None:
    plan = plan_for(24, ceiling=10)
    assert (plan.micro_batch, plan.accumulation_steps) == (8, 3)
    counts, _ = updates(plan, epochs=3, samples=45)  # 5 whole micro-batches an epoch
    assert counts == [24] * 5


def test_the_gradient_is_that_of_the_whole_effective_batch() -> None:
    plan = plan_for(24, ceiling=8)
    _, weights = updates(plan, epochs=1, samples=24)
    inputs = torch.arange(24.0) / 24
    # d/dw of mean((w x - 1)^2) at w = 0 is -2 mean(x)
    assert weights == pytest.approx([0.1 * 2 * float(inputs.mean())])


def test_precision_is_that_of_the_plan() -> None:
    assert example_plan().to_accelerate().accelerator["mixed_precision"] == "bf16"
    assert plan_for(24, ceiling=8).to_accelerate().accelerator["mixed_precision"] == "no"


def test_a_ragged_plan_is_refused_and_nearest_gives_one_size() -> None:
    plan = ragged_plan(257, ((86, 86, 85),))
    with pytest.raises(UsageError, match="Accelerate takes micro-batches of one size"):
        plan.to_accelerate()
    assert plan.to_accelerate(nearest=True).dataloader["batch_size"] == 64
