"""Small whole numbers of the sample and of the user's code are read back as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import find_gpu
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from tests.support.seen import Seen
from tests.support.simulated import (
    WIDTH,
    mlp,
    run,
)


class FromNumbers(nn.Module):
    """Reads back, on the GPU, what follows from numbers in its own code."""

    def __init__(self):
        super().__init__()
        self.layer, self.read = nn.Linear(WIDTH, WIDTH), Seen()

    def forward(self, x):
        sides = torch.as_tensor([(4, 5), (2, 3)], device=x.device)
        areas = sides.prod(1)
        self.read += [int(areas.sum()), bool((sides[:, 0] * sides[:, 1] != areas).any())]
        self.read += [int(side) for row in sides for side in row]
        areas[0] = 7
        self.read.append(int(areas[0]))
        return self.layer(x)


def test_numbers_of_the_users_code_are_read_back_as_they_are(capsys):
    def loss(model, batch):
        value = model(batch).sum()
        print(model.read)
        return value

    run(FromNumbers(), loss=loss)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "[26, False, 4, 5, 2, 3, 7]"


class Patches(nn.Module):
    """Takes from its inputs how many rows belong to each image, as vision towers do."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(WIDTH, WIDTH), Seen()
        self.register_buffer("merge", torch.tensor(2))

    def forward(self, rows, grid, ids):
        sides = grid // self.merge
        counts = grid.prod(1)
        ends = F.pad(counts.cumsum(0), (1, 0))
        parts = rows.flatten(0, 1).split(counts.tolist())
        starts = torch.repeat_interleave(ends[:-1], counts)
        within = torch.arange(counts.sum(), device=rows.device) - starts
        first = starts[within == 0]
        self.seen.append([sides[-1].tolist(), parts[0].shape[0], first.shape[0], ids[0, 0].item()])
        self.merge.add_(1)
        grid.zero_()
        return self.layer(torch.cat(parts))


PATCHES = {
    "rows": torch.zeros(2, 24, WIDTH),
    "grid": torch.tensor([[4, 6], [4, 6]]),
    "ids": torch.full((2, 128), 5),
}


@pytest.mark.parametrize("n", [2, 3, 500])
def test_small_whole_numbers_of_the_sample_are_read_back_as_they_are(n, capsys):
    def loss(model, batch):
        value = model(**batch).sum()
        print(model.seen)
        return value

    model = Patches()
    run(model, n=n, sample=PATCHES, loss=loss)
    # the grid, merged by twos, then threes, one row a sample, and the largest token id
    seen = f"[[[2, 3], 24, {n}, 5], [[1, 2], 24, {n}, 5]]"
    assert capsys.readouterr().out.splitlines()[-1] == seen
    assert PATCHES["grid"].tolist() == [[4, 6], [4, 6]]
    assert model.merge == 2


def test_shapes_that_follow_values_of_the_sample_say_so():
    workload = Workload(model=Patches(), batch=batch_builder(PATCHES))
    ran = VirtualGpu(find_gpu("t4")).run(workload, micro_batch=2, accumulation_steps=1)
    assert "(index, repeat_interleave) followed those of the sample" in ran.notes[-1]


def test_values_that_are_written_over_with_unknown_ones_are_unknown_in_every_view():
    seen = Seen()

    def loss(model, batch):
        output = model(batch)
        known = torch.tensor([3, 4, 5], device=output.device)
        last = known[1:]
        known[2] = output.argmax()
        seen.append(last.tolist())
        known.fill_(7)
        seen.append(last.tolist())
        return output.sum()

    run(mlp(), loss=loss)
    assert seen[:2] == [[1, 1], [1, 1]]


def test_a_sample_without_values_has_none():
    seen = Seen()

    def loss(model, batch):
        seen.append(batch[1].tolist())
        return model(batch[0]).sum()

    sample = torch.zeros(2, WIDTH), torch.empty(2, 2, dtype=torch.int64, device="meta")
    run(mlp(), loss=loss, sample=sample, n=2)
    assert seen[0] == [[1, 1], [1, 1]]


def test_lists_of_sizes_that_are_filled_one_by_one_are_known():
    seen = Seen()

    def loss(model, batch):
        shapes = torch.empty(2, 2, dtype=torch.int64, device=batch.device)
        for level, side in enumerate((8, 4)):
            shapes[level, 0], shapes[level, 1] = side, side
        seen.append(bool((shapes[:, 0] * shapes[:, 1]).sum() == 80))
        half = torch.ceil(shapes.float() / 3).long()
        seen.append(half.tolist())
        return model(batch).sum()

    run(mlp(), loss=loss)
    assert seen[:2] == [True, [[3, 3], [2, 2]]]


class IndexesTwice(nn.Module):
    """Reads rows at places that are not known, and then at places that are."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(5, WIDTH))
        self.read = Seen()

    def forward(self, x):
        numbers = torch.tensor([2, 4], device=x.device)
        unknown = x[:2, 0].long()
        self.read.append(int(numbers[torch.tensor([1, 0], device=x.device)][0]))
        self.read.append(int(x.long()[0, :2][torch.tensor([1, 0], device=x.device)][0]))
        return x + self.table[unknown].sum() + self.table[numbers].sum()


def test_numbers_read_at_known_places_are_known_in_every_run_of_a_device():
    model = IndexesTwice()
    workload = Workload(
        model=model,
        batch=batch_builder(torch.zeros(2, WIDTH)),
        loss=lambda model, batch: model(batch).sum(),
    )
    device = VirtualGpu(find_gpu("a100-40gb"))
    runs = [device.run(workload, micro_batch=4, accumulation_steps=1) for _ in range(2)]
    assert runs[0].notes == runs[1].notes
    assert runs[0].trace == runs[1].trace
    assert any("(index)" in note for note in runs[1].notes)
