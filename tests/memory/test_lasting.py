"""What lasts from update to update is a lower bound of what is reserved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import find_gpu
from autobatch.levers.known import LEVERS
from autobatch.levers.setup import Setup
from autobatch.memory.lasting import lasting_bytes
from autobatch.memory.trace import Allocation, Trace
from autobatch.workload.workload import Workload


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.change = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.change(self.norm(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Block(32) for _ in range(4)])
        self.unused = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x).mean((2, 3))


def test_counters_of_steps_and_what_ends_with_a_micro_batch_are_left_out() -> None:
    sizes = {"parameters": 400, "gradients": 300, "optimizer_state": 8, "activations": 900}
    blocks = tuple(Allocation(n, of, "step", "op") for of, n in sizes.items())  # type: ignore[arg-type]
    trace = Trace(
        micro_batch=1, accumulation_steps=1, blocks=blocks, events=(0, 1, 3, ~1, 2), marks=()
    )
    assert lasting_bytes(trace) == 700


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adafactor"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_no_run_with_a_lever_that_keeps_the_state_reserves_less(kind: str, size: int) -> None:
    training = Workload(
        model=Model(),
        batch=lambda n: torch.zeros(n, 32, 8, 8),
        optimizer=getattr(torch.optim, kind),
    )
    setup = Setup(workload=training, gpu=find_gpu("a100-40gb"))

    def ran(setup: Setup, n: int):
        device = VirtualGpu(setup.gpu, setup.settings)
        with setup.in_force():
            return device.run(setup.workload, micro_batch=n, accumulation_steps=2)

    lasting = lasting_bytes(ran(setup, 3).trace)
    assert lasting >= 2 * sum(p.nbytes for p in training.model.blocks.parameters())
    options = [o for lever in LEVERS.values() for o in lever.options(setup) if o.keeps_state]
    assert {o.lever for o in options} >= {"precision", "checkpointing", "offload", "memory-format"}
    for option in options:
        found = ran(option.apply(setup), size)
        assert lasting <= lasting_bytes(found.trace) + 8, option.label
        assert lasting <= found.replay.peak_reserved_bytes, option.label
