"""What is read from the device and is not known has documented values and bounds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import WorkloadError
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.trace import Trace
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
    assert written[:3] == [rows * WIDTH * 4 for rows in (2, 2, 4)]


def test_a_mask_that_rows_are_written_by_has_as_many_in_its_gradient():
    def loss(model, batch):
        output, rows = model(batch), model(batch[:3])
        output = output.clone()
        output[batch[:, 0] > 0] = rows
        return output.sum()

    assert run(mlp(), loss=loss)


def test_unknown_floats_are_not_all_zero():
    seen = Seen()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.extend([bool(batch.any()), bool(torch.zeros_like(batch).any())])
        return model(batch).mean()

    run(mlp(), loss=loss)
    assert seen[:2] == [True, False]


def test_times_that_a_solver_steps_to_are_known():
    times, seen = torch.linspace(0.0, 1.0, 5), Seen()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        there = times.to(batch)
        steps = torch.linspace(0.0, 2.0, 3, device=batch.device)
        seen.extend([float(there[2]), bool(there[1] < there[3]), steps[-1].item()])
        return model(batch).mean()

    run(mlp(), loss=loss)
    assert seen[:3] == [0.5, True, 2.0]


def test_an_expanded_tensor_in_a_closure_keeps_its_values():
    table, seen = torch.tensor([3.0, 4.0]).expand(5, 2), Seen()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(table.tolist())
        return model(batch).mean()

    run(mlp(), loss=loss)
    assert seen[0] == [[3.0, 4.0]] * 5


def test_ones_written_at_listed_places_of_zeros_are_as_many_as_the_places():
    shapes = Seen()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        output = model(batch)
        rows = torch.arange(batch.shape[0], device=batch.device)
        labels = output.argmax(-1)
        mask = torch.zeros_like(output)
        mask[rows, labels] = 1
        shapes.append(tuple(output[mask == 1].shape))
        return output[mask == 1].mean()

    run(mlp(), loss=loss)
    assert shapes[0] == (len_of_batch(),)


def len_of_batch() -> int:
    sizes = Seen()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        sizes.append(batch.shape[0])
        return model(batch).mean()

    run(mlp(), loss=loss)
    return int(sizes[0])


class Bag(nn.Module):
    """Bags of rows, whose gradient may be sparse."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(100, WIDTH, mode="sum", sparse=sparse)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bag(ids).mean()


def bag_run(sparse: bool) -> Trace:
    ids = torch.ones(2, 3, dtype=torch.int64)
    return run(Bag(sparse), sample=ids, loss=lambda model, batch: model(batch), gpu="t4", n=2)


def test_embedding_bags_run():
    blocks = bag_run(sparse=False).blocks
    made = {(b.op, b.phase, b.size_bytes) for b in blocks if "_embedding_bag" in b.op}
    assert ("aten::_embedding_bag", "forward", 2 * WIDTH * 4) in made
    assert ("aten::_embedding_bag_backward", "backward", 100 * WIDTH * 4) in made


def test_sparse_gradients_of_bags_are_refused_by_name():
    with pytest.raises(WorkloadError, match="sparse gradients of an embedding"):
        bag_run(sparse=True)


class WithTable(nn.Module):
    """Has a sparse buffer, which it uses or not."""

    def __init__(self, uses: bool) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.eye(WIDTH).to_sparse())
        self.uses = uses

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.head(x)
        return torch.sparse.mm(self.table, out.T).mean() if self.uses else out.mean()


def test_a_sparse_buffer_that_is_not_used_is_no_obstacle():
    run(WithTable(uses=False), loss=lambda model, batch: model(batch))


def test_a_sparse_tensor_that_is_used_is_named():
    with pytest.raises(WorkloadError, match="sparse tensor of shape"):
        run(WithTable(uses=True), loss=lambda model, batch: model(batch))


def test_addresses_tell_tensors_apart():
    seen = Seen()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        first, second = batch.clone(), batch.clone()
        seen.append(first.data_ptr() == first.view(-1).data_ptr())
        seen.append(len({first.data_ptr(), second.data_ptr(), first[1:].data_ptr()}))
        seen.append(first[1:].data_ptr() - first.data_ptr())
        return model(first).mean()

    run(mlp(), loss=loss)
    assert seen[:3] == [True, 3, 4 * WIDTH]


def test_either_of_two_marks_is_as_many_as_both():
    shapes = Seen()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        output = model(batch)
        picks = output[:, 0].argsort()
        marks = [torch.zeros(100, dtype=torch.uint8, device=batch.device) for _ in range(2)]
        for mark in marks:
            mark[picks] = 1
        shapes.extend([batch.shape[0], torch.where(marks[0] | marks[1])[0].shape[0]])
        return output.mean()

    run(mlp(), loss=loss)
    assert shapes[1] == 2 * shapes[0]


def test_marks_at_places_that_a_mask_chooses_are_written():
    seen = Seen()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        output = model(batch)
        table = torch.zeros_like(output)
        mask = output[:, 0] > 0.5
        seen.append(bool(table.any()))
        table[mask, output.argmax(-1)[mask]] = 1.0
        seen.append(bool(table.any()))
        return (output * table).mean()

    run(mlp(), loss=loss)
    assert seen[:2] == [False, True]
