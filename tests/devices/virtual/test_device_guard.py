"""Errors in backward are those of the user's code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autobatch.errors import WorkloadError
from tests.support.simulated import (
    mlp,
    run,
)


def test_an_error_in_backward_keeps_its_traceback_too():
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        output = model(batch)
        output.register_hook(lambda gradient: 1 / 0)
        return output.sum()

    with pytest.raises(WorkloadError, match="ZeroDivisionError") as failure:
        run(mlp(), loss=loss)
    assert isinstance(failure.value.__cause__, ZeroDivisionError)
