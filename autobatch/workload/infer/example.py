"""Inputs like the example that a model holds, as Lightning's modules do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.support.torch_private import FakeTensorMode
from autobatch.workload.infer.dry_run import TRIED_SAMPLES, fake_copy, quiet
from autobatch.workload.infer.fields import SURROGATE, Inferred
from autobatch.workload.sample import batch_builder

__all__ = ["infer_example"]


def infer_example(model: nn.Module, attribute: str) -> Inferred:
    """Return inputs like an example that the model holds, and the loss of a training step."""
    build = batch_builder(getattr(model, attribute))
    trains = hasattr(model, "training_step") and _trains_on(model, build)
    return Inferred(
        batch=build,
        loss=_training_step if trains else None,
        inputs_note=f"inputs inferred: the model's {attribute}",
        loss_note=f"loss inferred: training_step on {attribute}" if trains else SURROGATE,
    )


def _training_step(model: Any, batch: Any) -> Tensor:
    with warnings.catch_warnings():
        # Without a Trainer nothing is logged, and Lightning says so at every call.
        warnings.filterwarnings("ignore", message=r".*self\.log")
        result = model.training_step(batch, 0)
    loss: Tensor = result["loss"] if isinstance(result, Mapping) else result
    return loss


def _trains_on(model: nn.Module, build: Callable[[int], Any]) -> bool:
    """Say whether `training_step` runs on these batches: an example may lack the labels."""
    mode = FakeTensorMode()
    try:
        clone = fake_copy(model, mode).train()
        with mode, torch.no_grad(), quiet():
            loss = _training_step(clone, build(TRIED_SAMPLES))
    except Exception:
        return False
    return isinstance(loss, Tensor) and loss.dim() == 0
