"""Ops without a shape rule get their shapes on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.simulated import (
    mlp,
    ops,
    run,
)


def test_an_op_without_a_shape_rule_is_run_on_zeros_on_the_cpu():
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        labels = torch.zeros(batch.size(0), dtype=torch.int64, device=batch.device)
        return F.multi_margin_loss(model(batch), labels)

    assert "aten::multi_margin_loss" in ops(run(mlp(), loss=loss))
