"""What is said where nothing fits names what the run does not do yet, and what could let it fit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from autobatch import DoesNotFitError, Workload, find_gpu
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.support.units import MIB
from autobatch.tuning.planning import plan_of, probe_of

CHECKPOINTING, STATE = "activation checkpointing", "an optimizer with less state"


class Layers(nn.Module):
    def __init__(self, width: int, *, checkpoints: bool = False) -> None:
        super().__init__()
        rest = (nn.Sequential(nn.Linear(width, width), nn.Sigmoid()) for _ in range(4))
        self.layers = nn.ModuleList(rest)
        self.checkpoints = checkpoints

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpoints else layer(x)
        return x


def message_of(
    width: int, rows: int, mib: int, *, gpu: str = "a100-40gb", model: nn.Module, **options: object
) -> str:
    """Return the error of a model on rows of a width, on a card of so little memory."""
    training = Workload(model=model, batch=lambda n: torch.zeros(n, rows, width), **options)
    card = replace(find_gpu(gpu), name="small", capacity_bytes=mib * MIB, context_bytes=0)
    with pytest.raises(DoesNotFitError, match="not even micro-batch 1 fits on small") as caught:
        plan_of(probe_of(training, VirtualGpu(card), target=4, headroom=0.0), target=4)
    return str(caught.value)


WIDE = partial(message_of, 2048, 8)
"""Weights of 64 MiB, with gradients and two moments of as much each."""

LONG = partial(message_of, 64, 200_000)
"""Activations of 49 MiB a layer."""


def test_activations_that_do_not_fit_may_be_halved_or_recomputed() -> None:
    message = LONG(300, model=Layers(64))
    assert 'try autocast="bf16", activation checkpointing, an optimizer' in message
    assert " or a larger GPU (" in message


def test_half_precision_is_that_of_the_card() -> None:
    assert 'try autocast="fp16", ' in LONG(300, gpu="t4", model=Layers(64))
    assert "autocast" not in LONG(150, model=Layers(64), autocast="bf16")


def test_checkpoints_are_not_named_where_they_are_on() -> None:
    message = LONG(150, model=Layers(64, checkpoints=True))
    assert CHECKPOINTING not in message
    assert "autocast" in message


def test_less_state_is_named_only_where_there_is_some() -> None:
    assert STATE not in LONG(300, model=Layers(64), optimizer=torch.optim.SGD)


def test_weights_that_do_not_fit_are_told_of_nothing_that_leaves_them_as_they_are() -> None:
    message = WIDE(100, model=Layers(2048))
    assert " short; try a larger GPU (" in message

    message = WIDE(200, model=Layers(2048))
    assert f"try {STATE} or a larger GPU" in message
