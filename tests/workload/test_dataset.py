"""The largest items of a data set are found, collated and named, and nothing else changes."""

from __future__ import annotations

import random
from collections import namedtuple
from itertools import count, pairwise
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from autobatch.errors import SampleError
from autobatch.workload import dataset as looking
from autobatch.workload.dataset import Drawn, _refining, dataset_length, draw
from autobatch.workload.tree import sized_leaves

Example = namedtuple("Example", "tokens label")
LENGTHS = [5 + (7 * index) % 20 for index in range(60)]
LENGTHS[37] = 90


def note_of(drawn: Drawn) -> str:
    """Return the note that names the items."""
    (note,) = drawn.notes
    return note


def texts(lengths: list[int]) -> list[dict[str, Any]]:
    return [{"input_ids": [1] * length, "label": 0} for length in lengths]


def pairs(lengths: list[tuple[int, int]]) -> list[dict[str, torch.Tensor]]:
    """Items with two texts each, of their own lengths."""
    return [{"source": torch.ones(s), "target": torch.ones(t)} for s, t in lengths]


def pad(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad each text of the items to the longest."""
    fields = [key for key in items[0] if key != "label"]
    rows = {key: [torch.as_tensor(item[key]) for item in items] for key in fields}
    return {key: pad_sequence(row, batch_first=True) for key, row in rows.items()}


def loader(items: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(items, **{"batch_size": 4, "collate_fn": pad} | options)


class Stream(IterableDataset):
    """Rows of the lengths given, one after another."""

    def __init__(self, lengths: Any) -> None:
        self.lengths = lengths

    def __iter__(self) -> Any:
        return (torch.ones(length) for length in self.lengths)


class Slow(Dataset):
    """Texts that take a second each to read, by `a_second_each`, and remember what was read.

    A list of theirs would be put back.
    """

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.queue = lengths, SimpleQueue()

    @property
    def read(self) -> list[int]:
        items = [self.queue.get() for _ in range(self.queue.qsize())]
        for item in items:
            self.queue.put(item)
        return items

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.queue.put(index)
        return torch.ones(self.lengths[index])


# Which item


def test_the_longest_text_decides_wherever_it_is_and_is_named():
    drawn = draw(loader(texts(LENGTHS)))
    assert drawn.batch["input_ids"].shape[1] == 90 and drawn.limit == 60
    assert note_of(drawn) == (
        "the probe's batches repeat dataset[37], the largest of all 60 items (input_ids 90)"
    )


def test_items_of_equal_size_need_no_note():
    drawn = draw(TensorDataset(torch.zeros(50, 8), torch.zeros(50)))
    assert drawn.notes == () and drawn.limit == 50
    assert draw(torch.zeros(4, 8)).notes == ()


def test_a_data_set_that_is_only_indexed_is_looked_through():
    class Table:  # like datasets.Dataset, which is no subclass of torch's
        rows = texts(LENGTHS)

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            assert isinstance(index, int)
            return self.rows[index]

    assert "dataset[37], the largest of all 60 items" in note_of(draw(loader(Table())))
    assert draw(Table()).limit == 60


def test_a_list_of_tensors_is_a_batch_and_as_data_of_a_loader_a_data_set():
    tensors = [torch.zeros(length, 3) for length in (4, 9, 2)]
    assert draw(tensors).batch is tensors and draw(tensors).notes == ()
    drawn = draw(DataLoader(tensors, batch_size=2))  # type: ignore[arg-type]
    assert drawn.batch.shape[1:] == (9, 3) and drawn.limit == 3
    assert "dataset[1]" in note_of(drawn) and "(9×3)" in note_of(drawn)


def test_fields_are_named_and_positions_bracketed():
    class Tuples(Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return torch.zeros(3, 1000 * (index + 1)), "a" * index

    assert note_of(draw(Tuples())).endswith(
        "dataset[2], the largest of all 3 items ([0] 3×3,000, [1] 2)"
    )


def test_a_batch_sampler_of_varying_batches_leaves_the_worst_item_in_charge():
    items = texts(LENGTHS)
    budget = [[37], list(range(37)), list(range(38, 60))]
    drawn = draw(DataLoader(items, batch_sampler=budget, collate_fn=pad))  # type: ignore[arg-type]
    assert drawn.batch["input_ids"].shape[1] == 90 and "dataset[37]" in note_of(drawn)


# How far it looks


@pytest.fixture
def a_second_each(monkeypatch):
    monkeypatch.setattr(looking, "time", SimpleNamespace(monotonic=count().__next__))


@pytest.mark.usefixtures("a_second_each")
def test_looking_ends_after_its_time_and_says_how_far_it_got(monkeypatch):
    monkeypatch.setattr(looking, "SECONDS_LOOKING", 6)
    items = Slow(list(range(1, 1001)))
    assert note_of(draw(items)) == (
        "the probe's batches repeat dataset[999], the largest of 7 of the 1,000 items, looked at "
        "in 7.0 s (1,000); if you know a larger one, pass a batch of it as sample="
    )
    assert items.read == [0, 999, 512, 256, 768, 128, 384]


@pytest.mark.usefixtures("a_second_each")
def test_items_that_are_all_alike_are_looked_at_for_less_long(monkeypatch):
    monkeypatch.setattr(looking, "SECONDS_ALIKE", 2)
    items = Slow([7] * 1000)
    assert draw(items).notes == () and len(items.read) == 3


@pytest.mark.usefixtures("a_second_each")
def test_a_data_set_whose_last_item_uses_up_the_time_was_looked_at_whole(monkeypatch):
    monkeypatch.setattr(looking, "SECONDS_LOOKING", 2)
    assert "the largest of all 3 items" in note_of(draw(Slow([1, 2, 3])))


def test_no_item_is_read_twice():
    items = Slow(LENGTHS)
    draw(items)
    assert sorted(items.read) == list(range(60))


@given(length=st.integers(0, 300))
def test_the_order_has_every_index_once_and_both_ends_first(length):
    order = list(_refining(length))
    assert sorted(order) == list(range(length))
    assert set(order[:2]) == {0, length - 1} or length == 0


@given(length=st.integers(2, 3000), seen=st.integers(2, 3000))
def test_stopping_early_leaves_no_large_gap(length, seen):
    order = sorted(list(_refining(length))[:seen])
    gaps = [after - before for before, after in pairwise(order)]
    assert max(gaps) <= max(1, 4 * length / min(seen, length))


def test_the_first_items_of_a_stream_are_looked_at(monkeypatch):
    drawn = draw(DataLoader(Stream([3, 8, 5]), batch_size=2))
    assert drawn.batch.shape[1] == 8 and drawn.limit is None
    assert note_of(drawn) == (
        "the probe's batches repeat item 2 of the stream, the largest of all 3 items (8)"
    )
    monkeypatch.setattr(looking, "ITEMS_STREAMED", 2)
    note = note_of(draw(Stream([3, 8, 50])))
    assert "item 2 of the stream, the largest of the first 2 items (8); if you know" in note


def test_a_stream_without_end_ends(monkeypatch):
    monkeypatch.setattr(looking, "ITEMS_STREAMED", 100)
    assert draw(Stream(iter(lambda: 7, None))).notes == ()


# What is collated


def test_texts_that_are_longest_in_different_items_are_padded_to_each():
    drawn = draw(loader(pairs([(4, 4), (30, 8), (5, 20), (6, 6)])))
    assert drawn.batch["source"].shape[1] == 30 and drawn.batch["target"].shape[1] == 20
    assert note_of(drawn) == (
        "the probe's batches repeat dataset[1], the largest of all 4 items (source 30, target 8), "
        "padded to what is longer in dataset[2] (target 20)"
    )


def test_images_that_are_highest_and_widest_in_different_items_are_padded_to_both():
    def frame(images: list[torch.Tensor]) -> torch.Tensor:
        height, width = (max(image.shape[dim] for image in images) for dim in (1, 2))
        frames = torch.zeros(len(images), 3, height, width)
        for row, image in zip(frames, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        return frames

    images = [torch.ones(3, *size) for size in [(10, 10), (90, 20), (20, 80), (50, 50)]]
    drawn = draw(loader(images, collate_fn=frame))
    assert drawn.batch.shape[1:] == (3, 90, 80)
    assert "dataset[3], the largest" in note_of(drawn)
    assert "longer in dataset[1] (3×90×20), dataset[2] (3×20×80)" in note_of(drawn)


def test_a_collate_function_that_only_stacks_gets_copies_of_the_largest():
    drawn = draw(DataLoader(pairs([(4, 4), (30, 8), (5, 20)]), batch_size=1))  # type: ignore[arg-type]
    assert drawn.batch["source"].shape[1] == 30 and drawn.batch["target"].shape[1] == 8
    assert "dataset[1]" in note_of(drawn) and "dataset[2]" not in note_of(drawn)


def test_a_batch_holds_an_even_number_of_items():
    many = pairs([(9, 9)]) + [{f"field{i}": torch.ones(2)} for i in range(8)]
    seen: SimpleQueue[int] = SimpleQueue()

    def collate(items: list[Any]) -> torch.Tensor:
        seen.put(len(items))
        return torch.zeros(len(items), 9)

    draw(loader(many, collate_fn=collate))
    draw(loader(texts([1, 2]), collate_fn=collate))
    numbers = [seen.get() for _ in range(seen.qsize())]
    assert numbers[:2] == [10, 20] and not any(number % 2 for number in numbers)


def test_items_with_names_of_their_own_are_not_all_kept(monkeypatch):
    monkeypatch.setattr(looking, "EXTENTS_COMPARED", 3)
    words = [{f"word{index}": [0] * (index + 1)} for index in range(20)]
    sizes: SimpleQueue[int] = SimpleQueue()
    draw(loader(words, collate_fn=lambda items: sizes.put(len(items)) or torch.zeros(2, 1)))
    assert [sizes.get(), sizes.get()] == [6, 12]


def test_of_ready_batches_the_one_with_most_bytes_per_row_is_taken():
    batches = [torch.zeros(8, 16), torch.zeros(2, 40), torch.zeros(4, 32)]
    drawn = draw(DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert drawn.batch.shape == (2, 40) and drawn.limit is None
    assert note_of(drawn) == (
        "the probe's batches repeat the rows of dataset[1], the largest per row of all 3 batches "
        "(2×40)"
    )
    smaller_at_the_end = [torch.zeros(8, 16), torch.zeros(3, 16)]
    assert draw(DataLoader(smaller_at_the_end, batch_size=None)).notes == ()  # type: ignore[arg-type]


def test_a_data_set_that_is_read_by_lists_of_indices_gives_batches():
    class Bulk(Dataset):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, indices: list[int]) -> torch.Tensor:
            return pad_sequence([torch.ones(index + 1) for index in indices], batch_first=True)

    sampler = BatchSampler(SequentialSampler(Bulk()), batch_size=2, drop_last=False)
    drawn = draw(DataLoader(Bulk(), sampler=sampler, batch_size=None))  # type: ignore[arg-type]
    assert drawn.batch.shape[1] == 5 and "the rows of dataset[4]" in note_of(drawn)


def test_another_library_s_loader_is_a_stream_of_batches():
    class Loader:
        def __iter__(self) -> Any:
            return (torch.zeros(2, length) for length in (3, 9, 5))

    drawn = draw(Loader())
    assert drawn.batch.shape == (2, 9)
    assert "the rows of batch 2 of the stream, the largest per row of all 3" in note_of(drawn)


# What a size is


@pytest.mark.parametrize(
    ("item", "sizes"),
    [
        (torch.zeros(3, 4), [((), (3, 4), 48)]),
        (torch.eye(3).to_sparse(), [((), (3, 3), 36)]),
        (np.zeros((2, 5), dtype=np.int8), [((), (2, 5), 10)]),
        ("text", [((), (4,), 4)]),
        ([1, 2, 3], [((), (3,), 3)]),
        (([1, 2], [3], 4), [(("0",), (2,), 2), (("1",), (1,), 1)]),
        ([torch.zeros(2), "a"], [(("0",), (2,), 8), (("1",), (1,), 1)]),
        (Example([1, 2], 1), [(("tokens",), (2,), 2)]),
        ({"choices": [[1, 2], [3]]}, [(("choices",), (2,), 5)]),
        ({"a": {"b": b"xyz"}, "none": None}, [(("a", "b"), (3,), 3)]),
        (object(), []),
    ],
)
def test_the_size_of_an_item_is_that_of_its_leaves(item, sizes):
    assert list(sized_leaves(item)) == sizes


def test_images_and_records_have_a_size():
    image = pytest.importorskip("PIL.Image").new("RGB", (8, 5))
    assert list(sized_leaves(image)) == [((), (5, 8), 120)]

    class Record:
        def __init__(self) -> None:
            self.image, self.name = torch.zeros(2), "ab"

    assert list(sized_leaves(Record())) == [(("image",), (2,), 8), (("name",), (2,), 2)]


# Errors


def test_an_item_that_cannot_be_read_is_named():
    class Damaged(Slow):
        def __getitem__(self, index: int) -> torch.Tensor:
            if index == 41:
                raise OSError("truncated file\nat byte 7")
            return super().__getitem__(index)

    with pytest.raises(SampleError) as caught:
        draw(Damaged(LENGTHS))
    assert str(caught.value) == (
        "dataset[41] cannot be read (OSError: truncated file at byte 7): repair it or leave it "
        "out, or pass one batch"
    )
    with pytest.raises(SampleError, match=r"item 3 of the stream cannot be read \(TypeError: "):
        draw(Stream([1, 2, "three"]))


@pytest.mark.parametrize("empty", [TensorDataset(torch.zeros(0, 3)), Stream([])])
def test_an_empty_data_set_is_an_error(empty):
    with pytest.raises(SampleError, match="the data set is empty"):
        draw(empty)


def test_items_that_cannot_be_collated_are_an_error_that_names_the_loader():
    with pytest.raises(SampleError, match="pass a DataLoader with the collate_fn"):
        draw(DataLoader([object(), object()]))  # type: ignore[arg-type]


# What stays as it was


class Lazy(Slow):
    """Opens its file with the first item, counts, and draws from every generator there is."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(lengths)
        self.file: object | None = None
        self.count = 0
        self.torch, self.python = torch.Generator().manual_seed(1), random.Random(1)
        self.numpy, self.older = np.random.default_rng(1), np.random.RandomState(1)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.file = self.file or object()
        self.extra = self.count = self.count + 1
        self.draws()
        return super().__getitem__(index)

    def draws(self) -> list[float]:
        own = [torch.rand(1, generator=self.torch).item(), self.python.random()]
        own += [self.numpy.random(), self.older.random()]
        return [*own, torch.rand(1).item(), random.random(), np.random.random()]


def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: Subset(d, [3, 1]), lambda d: ConcatDataset([d])]
)
def test_looking_leaves_data_set_and_random_state_as_they_were(wrap):
    seed()
    expected = Lazy(LENGTHS).draws()
    items = Lazy(LENGTHS)
    seed()
    draw(wrap(items))
    assert items.read and items.file is None and items.count == 0 and not hasattr(items, "extra")
    assert items.draws() == expected


def test_a_failure_leaves_the_data_set_as_it_was():
    items = Lazy([1, 2, -1])
    with pytest.raises(SampleError, match=r"dataset\[2\] cannot be read"):
        draw(items)
    assert items.file is None and items.count == 0


def test_a_loader_is_not_started_and_its_sampler_not_drawn_from():
    generator = torch.Generator().manual_seed(5)
    started = loader(
        texts(LENGTHS), shuffle=True, generator=generator, num_workers=2, persistent_workers=True
    )
    state = generator.get_state()
    draw(started)
    assert started._iterator is None and torch.equal(generator.get_state(), state)


def test_a_loop_over_the_loader_goes_on_where_it_was():
    items = DataLoader(Stream([1, 2, 3, 4]), batch_size=1)
    loop = iter(items)
    assert next(loop).shape[1] == 1
    draw(items)
    assert [row.shape[1] for row in loop] == [2, 3, 4]


def test_the_length_of_a_data_set_limits_the_micro_batch():
    items = TensorDataset(torch.zeros(10, 2))
    assert dataset_length(items) == 10
    assert dataset_length(DataLoader(items, batch_size=4, sampler=[1, 2, 3])) == 3
    assert dataset_length(DataLoader(Stream([1]))) is None
    assert dataset_length(torch.zeros(4)) is None
