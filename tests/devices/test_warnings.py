"""What would fail, grow or train less than it seems to is refused or said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autobatch
from autobatch.errors import WorkloadError

WIDTH = 64


def tune(model: nn.Module, loss: Any = None, **options: Any) -> autobatch.Plan:
    return autobatch.tune(
        model, target=64, sample=torch.ones(1, WIDTH), optimizer=torch.optim.SGD,
        loss=loss or (lambda model, x: model(x).square().mean()), **{"gpu": "t4", **options},
    )  # fmt: skip


def warned(plan: autobatch.Plan, word: str) -> list[str]:
    return [warning for warning in plan.warnings if word in warning]


def test_outputs_that_are_kept_are_said_to_fill_the_card() -> None:
    kept: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        kept.append(model(x).detach())
        return model(x).square().mean()

    model = nn.Linear(WIDTH, 4096)
    (note,) = warned(tune(model, loss), "with every window")
    assert "memory grows by about 1.00 MiB with every window" in note  # 64 samples of 16 KiB
    assert "the budget is full after about 1" in note and not kept
    assert not warned(tune(model), "with every window")


def test_a_list_of_losses_is_too_small_to_be_said() -> None:
    losses: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        losses.append(model(x).square().mean())
        return losses[-1]

    assert not warned(tune(nn.Linear(WIDTH, 4096), loss), "with every window")


def test_layers_that_a_device_map_spreads_are_refused() -> None:
    mapped = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    mapped.hf_device_map = {"layer.0": 0, "layer.1": 1, "head": "cpu"}
    with pytest.raises(WorkloadError, match="on cuda:0 and cuda:1"):
        tune(mapped)
    mapped.hf_device_map = {"": 0}
    assert tune(mapped).micro_batch == 64


def test_data_parallel_is_said_to_be_taken_off() -> None:
    plain = nn.Linear(WIDTH, WIDTH)
    (note,) = warned(tune(nn.DataParallel(plain)), "nn.DataParallel was taken off")
    assert "outputs of all" in note
    assert not warned(tune(plain), "DataParallel was")


@pytest.mark.slow
def test_a_model_that_does_not_fit_before_it_is_sharded_is_said_not_to() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.utils.skip_init(nn.Linear, WIDTH, 2**15, bias=False)
            self.narrow = nn.utils.skip_init(nn.Linear, 2**15, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.narrow(self.wide(x))  # type: ignore[no-any-return]

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(32))  # 16 MiB each

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model = Blocks()
    options = {"world_size": 8, "sharding": "fsdp", "gpu": autobatch.GpuSpec(
        name="tiny", capacity_bytes=400 * 2**20, context_bytes=0)}  # fmt: skip
    word = "the whole model takes 512 MiB"
    assert warned(tune(model, **options, headroom=0.0), word)
    larger = autobatch.GpuSpec(name="larger", capacity_bytes=2**30, context_bytes=0)
    assert not warned(tune(model, **{**options, "gpu": larger}), word)
