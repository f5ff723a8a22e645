"""What reading the samples of a check changes is put back."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from autobatch import check_equivalence


class Augmented(Dataset[Any]):
    """Counts its reads, and draws from generators of its own."""

    def __init__(self) -> None:
        self.numpy, self.torch = np.random.default_rng(1), torch.Generator().manual_seed(0)
        self.reads = 0
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        self.numpy.random()
        self.kept[index] = torch.rand(3, generator=self.torch)
        return self.kept[index], index % 3

    def state(self) -> Any:
        drawn = self.numpy.bit_generator.state["state"]["state"]
        return self.reads, drawn, self.torch.get_state().tolist(), dict(self.kept)


class Collate:
    calls = 0

    def __call__(self, items: list[Any]) -> Any:
        self.calls += 1
        return default_collate(items)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("is_loader", [False, True])
def test_a_data_set_and_its_collate_function_are_as_before(is_loader: bool) -> None:
    data, collate = Augmented(), Collate()
    generator = torch.Generator().manual_seed(9)
    loader = DataLoader(data, 4, shuffle=True, generator=generator, collate_fn=collate)
    before = (data.state(), generator.get_state().tolist())
    sample = loader if is_loader else data
    result = check_equivalence(
        nn.Linear(3, 3), sample, micro_batch=2, accumulation_steps=4, loss=loss
    )
    assert result.equivalent, str(result)
    assert (data.state(), generator.get_state().tolist()) == before
    assert collate.calls == 0


def test_what_a_weight_counts_is_as_before() -> None:
    class Weight:
        calls = 0

        def __call__(self, batch: Any) -> float:
            self.calls += 1
            return float(len(batch[1]))

    weight = Weight()
    batch = (torch.randn(8, 3), torch.arange(8) % 3)
    assert check_equivalence(nn.Linear(3, 3), batch, loss=loss, weight=weight).equivalent
    assert weight.calls == 0


@pytest.mark.parametrize("kind", ["map-style", "stream"])
def test_a_pipe_that_was_read_on_is_told_of(kind: str) -> None:
    read, write = os.pipe()
    os.write(write, b"1\n" * 64)
    os.close(write)

    class Lines(Dataset[Any] if kind == "map-style" else IterableDataset[Any]):  # type: ignore[misc]
        file = os.fdopen(read)

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> Any:
            return torch.full((3,), float(self.file.readline())), 0

        def __iter__(self) -> Any:
            return iter([self[0], self[1]])

    with Lines.file:
        result = check_equivalence(nn.Linear(3, 3), Lines(), loss=loss)
    assert any("Lines.file" in note and "cannot be put back" in note for note in result.notes)
