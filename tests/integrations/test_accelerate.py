import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="accelerate is not installed")

from autobatch.integrations.accelerate import return_fp32


def test_a_model_returns_fp32_as_one_that_accelerate_prepared() -> None:
    model = nn.Linear(2, 2).bfloat16()
    for _ in range(2):  # once however often it is asked for
        return_fp32(model)
    output = model(torch.zeros(1, 2, dtype=torch.bfloat16))
    assert output.dtype == torch.float32
    output.sum().backward()
    assert model.weight.grad is not None
