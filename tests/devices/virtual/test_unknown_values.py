"""What is read from the device and is not known has documented values and bounds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import WorkloadError
from autobatch.gpus.catalogue import find_gpu
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from tests.support.seen import Seen
from tests.support.simulated import (
    WIDTH,
    mlp,
    run,
)


def test_values_read_from_the_device_take_the_documented_placeholders():
    seen = Seen()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        value = model(batch).square().mean()
        if torch.isnan(value) or not torch.isfinite(value) or torch.isinf(batch).any():
            raise FloatingPointError("placeholders must not look like a failure")
        seen.extend([value.item(), int((batch > 0).sum()), bool((batch == batch).all())])
        return value

    run(mlp(), loss=loss)
    assert seen[:3] == [0.6, 8 * 64, True]  # of comparisons that are true, all are counted


def test_shapes_that_depend_on_values_take_their_upper_bound_and_say_so():
    shapes = Seen()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        output = model(batch)
        picked = output[output > 0.5]
        shapes.extend([picked.shape, torch.nonzero(batch).shape, torch.unique(batch).shape])
        return picked.sum() + output.masked_select(batch > 0).sum()

    workload = Workload(model=mlp(), batch=batch_builder(torch.zeros(2, WIDTH)), loss=loss)
    ran = VirtualGpu(find_gpu("t4")).run(workload, micro_batch=4, accumulation_steps=1)
    assert shapes[:3] == [(4 * WIDTH,), (4 * WIDTH, 2), (4 * WIDTH,)]
    assert "upper bound" in ran.notes[0]
    assert "nonzero" in ran.notes[0]


def test_an_endless_loop_over_values_ends_in_a_clear_error():
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        value = model(batch).mean()
        while value > 0.1:
            pass
        return value

    with pytest.raises(WorkloadError, match="asked 10,000 times"):
        run(mlp(), loss=loss)


def test_sparse_gradients_are_refused_by_name():
    model = nn.Embedding(10, WIDTH, sparse=True)
    with pytest.raises(WorkloadError, match="sparse=False"):
        run(model, sample=torch.zeros(2, 4, dtype=torch.int64))


class Experts(nn.Module):
    """Sorts rows by expert, and parts them by counts that it reads back."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        counts = F.one_hot(chosen, 3).sum(0).tolist()
        parts = x[chosen.argsort()].split(counts)
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])


def test_parts_of_unknown_sizes_are_taken_to_be_equal_and_it_is_said():
    workload = Workload(model=Experts(), batch=batch_builder(torch.zeros(2, WIDTH)))
    ran = VirtualGpu(find_gpu("t4")).run(workload, micro_batch=8, accumulation_steps=1)
    assert "taken to be equal" in " ".join(ran.notes)
    written = [
        b.size_bytes for b in ran.trace.blocks if b.op == "aten::mm" and b.phase == "forward"
    ]
    assert written[:3] == [rows * WIDTH * 4 for rows in (3, 3, 2)]


def test_a_mask_that_rows_are_written_by_has_as_many_in_its_gradient():
    def loss(model, batch):
        output, rows = model(batch), model(batch[:3])
        output = output.clone()
        output[batch[:, 0] > 0] = rows
        return output.sum()

    assert run(mlp(), loss=loss)
