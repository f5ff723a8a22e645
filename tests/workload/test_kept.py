"""Reading items leaves data sets, transforms, collate functions and what they use as they were."""

from __future__ import annotations

import random
from functools import partial
from itertools import count
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from autobatch.workload import kept
from autobatch.workload.dataset import draw
from autobatch.workload.kept import attributes_kept

DRAWN = random.Random(3)
CALLS = 0


class Augment:
    """A transform with generators, deeper than the data set's own attributes."""

    names: ClassVar[list[str]] = []
    calls = 0

    def __init__(self) -> None:
        self.numpy, self.older = np.random.default_rng(0), np.random.RandomState(0)
        self.python, self.torch = random.Random(0), torch.Generator().manual_seed(0)
        self.draw = np.random.default_rng(0).random  # a method of a generator alone

    def __call__(self, row: torch.Tensor) -> torch.Tensor:
        Augment.calls += 1
        self.names.append("called")
        return row * sum(self.draws())

    def draws(self) -> list[float]:
        own = [self.numpy.random(), self.older.random(), self.python.random(), self.draw()]
        return [*own, torch.rand(1, generator=self.torch).item()]


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Rows(Dataset):
    """Writes to all that it has."""

    def __init__(self) -> None:
        self.transforms = (Augment(),)
        self.log: list[int] = []
        self.cache: dict[int, Any] = {1: "one"}
        self.seen, self.mean = np.zeros(50), torch.zeros(8)
        self.slotted = Slotted()

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> torch.Tensor:
        self.log.append(index)
        self.cache[index] = index
        self.seen[index] += 1
        self.slotted.count += 1
        row = self.transforms[0](torch.ones(8))
        self.mean += row
        return row


class Collate:
    def __init__(self) -> None:
        self.calls, self.python = 0, random.Random(0)

    def __call__(self, items: list[torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        self.python.shuffle(items)
        return torch.stack(items)


def test_what_reading_writes_and_draws_is_put_back_wherever_it_is() -> None:
    rows, collate = Rows(), Collate()
    draw(DataLoader(rows, collate_fn=collate))
    assert (rows.log, rows.cache, rows.slotted.count) == ([], {1: "one"}, 0)
    assert not rows.seen.any() and not rows.mean.any()
    assert rows.transforms[0].draws() == Augment().draws()
    assert (Augment.calls, Augment.names) == (0, [])
    assert collate.calls == 0 and collate.python.getstate() == random.Random(0).getstate()


def test_so_is_what_functions_read_around_them() -> None:
    given, counts, number = [torch.zeros(2)] * 8, {"calls": 0}, 0

    def collate(items: list[torch.Tensor], *, known: dict[str, int]) -> torch.Tensor:
        nonlocal number
        global CALLS
        number += 1
        CALLS += 1
        known["calls"] += 1
        return torch.stack(items) * DRAWN.random()

    draw(DataLoader(given, collate_fn=partial(collate, known=counts)))  # type: ignore[arg-type]
    assert (number, CALLS, counts) == (0, 0, {"calls": 0})
    assert DRAWN.getstate() == random.Random(3).getstate()


def test_items_that_a_collate_function_takes_apart_are_whole_again(monkeypatch) -> None:
    data = [{"x": torch.zeros(3), "y": i} for i in range(40)]

    def collate(items: list[Any]) -> Any:
        return torch.stack([item.pop("x").add_(1) for item in items])

    for most in (kept._MOST_ELEMENTS, 20):  # of fewer than the data, and more than a batch
        monkeypatch.setattr(kept, "_MOST_ELEMENTS", most)
        drawn = draw(DataLoader(data, collate_fn=collate))  # type: ignore[arg-type]
        assert all("x" in item and not item["x"].any() for item in data)
        assert drawn.batch.any()


def test_large_data_is_not_copied_and_a_long_list_is_cut_to_its_length(monkeypatch) -> None:
    monkeypatch.setattr(kept, "_MOST_ELEMENTS", 5)
    monkeypatch.setattr(kept, "_MOST_BYTES", 8)
    log, table, data = list(range(6)), dict.fromkeys(range(6)), torch.zeros(9)
    with attributes_kept(log, table, data):
        log.append(6)
        table[6] = None
        data += 1
    assert len(log) == len(table) == 6 and data.all()


def test_a_library_s_object_is_looked_into_and_not_written_to() -> None:
    torchvision = pytest.importorskip("torchvision")
    chain = torchvision.transforms.Compose([Augment()])
    expected = Augment().draws()
    with attributes_kept(lambda row: chain(row)):
        chain.cache = 1
        chain.transforms[0].draws()
    assert chain.cache == 1 and chain.transforms[0].draws() == expected


def test_a_stream_whose_items_are_all_alike_is_not_read_to_its_end() -> None:
    reads = count()

    class Stream(IterableDataset):
        read = 0

        def __iter__(self) -> Any:
            while True:
                next(reads)
                Stream.read += 1
                yield torch.zeros(3)

    draw(DataLoader(Stream(), batch_size=2))
    assert next(reads) == 512 and Stream.read == 0
