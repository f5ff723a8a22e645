"""Reading items leaves data sets, transforms, collate functions and what they use as they were."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import lzma
import os
import queue
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from autobatch.errors import SampleError
from autobatch.workload import files, kept
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
    reads: SimpleQueue[int] = SimpleQueue()

    class Stream(IterableDataset):
        read = 0

        def __iter__(self) -> Any:
            while True:
                reads.put(1)
                Stream.read += 1
                yield torch.zeros(3)

    draw(DataLoader(Stream(), batch_size=2))
    assert reads.qsize() == 512 and Stream.read == 0


# Files and iterators, which give each item once


class Held(IterableDataset):
    """Rows of numbers that are read on from what it holds."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __iter__(self) -> Iterator[torch.Tensor]:
        for value in self.held:
            yield torch.full((3,), float(value))


class ReadOn(Dataset):
    """Rows that are read on from what it holds, whatever the index."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3,), float(next(self.held)))


def numbers(path: Path, opener: Callable[..., Any], *, newline: str = "\n") -> Path:
    """Write the numbers up to 3,000, one a line, which are more bytes than a file buffers."""
    with opener(path, "wb") as file:
        file.write(newline.join([*map(str, range(3000)), ""]).encode())
    return path


@pytest.mark.parametrize("opener", [open, gzip.open, bz2.open, lzma.open])
@pytest.mark.parametrize("mode", ["rt", "rb"])
@pytest.mark.parametrize("data", [Held, ReadOn])
@pytest.mark.parametrize("skipped", [0, 2, 2500])
def test_a_file_is_read_on_from_where_it_was(tmp_path, opener, mode, data, skipped) -> None:
    with opener(numbers(tmp_path / "numbers", opener), mode) as file:
        for _ in range(skipped):
            next(file)  # after which a text does not tell where it is
        draw(data(file))
        assert [int(line) for line in file] == list(range(skipped, 3000))


def test_so_is_a_text_of_long_characters_and_line_ends(tmp_path) -> None:
    path = tmp_path / "text"
    path.write_bytes("é€\r\n😀\r".encode() * 4000)
    for newline in (None, "", "\n"):
        with (
            path.open(encoding="utf-8", newline=newline) as file,
            path.open(encoding="utf-8", newline=newline) as untouched,
        ):
            for each in (file, untouched):
                for _ in range(1501):
                    next(each)
            draw(Held(map(len, file)))
            assert file.read() == untouched.read()


def test_a_file_that_was_too_long_to_look_for_its_place_is_told_of(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_MOST_OF_A_TEXT", 10)
    with numbers(tmp_path / "numbers", open).open() as file:
        next(file)
        drawn = draw(Held(file))
    assert drawn.notes == (
        "Held.held (TextIOWrapper) may have been read on when 512 items were read: it cannot be "
        "put back, so let training begin with a new one",
    )


def test_a_file_around_another_is_put_back_and_finds_its_place_in_that(tmp_path) -> None:
    with numbers(tmp_path / "numbers", gzip.open).open("rb") as raw:
        packed = gzip.GzipFile(fileobj=raw)
        text = io.TextIOWrapper(packed)
        text.readline()
        data = Held(text)
        data.raw, data.packed = raw, packed
        draw(data)
        assert [int(line) for line in text] == list(range(1, 3000))


@pytest.mark.parametrize("reader", [csv.reader, csv.DictReader])
def test_a_table_is_read_on_from_where_it_was(tmp_path, reader) -> None:
    class Table(IterableDataset):
        def __init__(self, file: Any) -> None:
            self.reader = reader(file)

        def __iter__(self) -> Iterator[torch.Tensor]:
            for row in self.reader:
                yield torch.zeros(len(row))

    path = tmp_path / "table.csv"
    path.write_text("a,b\n" + "1,2\n" * 50)
    with path.open(newline="") as file, path.open(newline="") as untouched:
        table = Table(file)
        draw(table)
        assert list(table.reader) == list(reader(untouched))


def test_files_in_memory_hold_what_they_held() -> None:
    text, log, written = io.StringIO("1\n2\n3\n"), io.StringIO(), io.BytesIO(b"ab")
    text.readline()
    with attributes_kept([text, log, written]):
        text.read()
        log.write("more")
        written.write(b"xyz")
    assert (text.read(), log.getvalue(), written.getvalue(), written.tell()) == (
        "2\n3\n",
        "",
        b"ab",
        0,
    )


def test_a_file_that_is_closed_or_only_written_is_left_alone(tmp_path) -> None:
    with (tmp_path / "log").open("w") as log, attributes_kept([log, closed := io.BytesIO()]):
        closed.close()
        log.write("line")
    assert (tmp_path / "log").read_text() == "line"
    closed_before = Held([1, 2, 3])
    closed_before.file = closed
    assert draw(closed_before).notes == ()


def test_a_file_of_the_user_s_own_class_and_a_detached_one_are_no_obstacle() -> None:
    class Own(io.RawIOBase):
        place = 0

        def __init__(self) -> None:
            self.read_so_far: list[int] = []

    own, detached = Own(), io.TextIOWrapper(io.BytesIO(b"1"))
    detached.detach()
    with attributes_kept([own, detached]) as state:
        own.place = 5
        own.read_so_far.append(1)
    assert (own.place, own.read_so_far, state.lost) == (0, [], [])


def test_a_file_that_reading_closes_is_told_of() -> None:
    class Closing(Held):
        def __iter__(self) -> Iterator[torch.Tensor]:
            with self.held:
                yield from super().__iter__()

    (note,) = draw(Closing(io.BytesIO(b"1\n2\n"))).notes
    assert note.startswith("Closing.held (BytesIO) was closed when 2 items were read")


ITERATORS: dict[str, Callable[[], Iterator[int]]] = {
    "list": lambda: iter(list(range(9))),
    "tuple": lambda: iter(tuple(range(9))),
    "range": lambda: iter(range(9)),
    "dict": lambda: iter(dict.fromkeys(range(9))),
    "values": lambda: iter(dict(enumerate(range(9))).values()),
    "set": lambda: iter(set(range(9))),
    "text": lambda: iter("123456789"),
    "bytes": lambda: iter(b"123456789"),
    "deque": lambda: iter(deque(range(9))),
    "reversed": lambda: reversed(range(9)),
    "reversed list": lambda: reversed([*range(9)]),
    "map": lambda: map(int, iter("123456789")),
    "filter": lambda: filter(None, iter(range(9))),
    "calls": lambda: iter(partial(next, iter(range(9))), 7),
    "count": lambda: itertools.count(4, 3),
    "count of floats": lambda: itertools.count(0.5),
    "tee": lambda: itertools.tee(value for value in range(9))[0],
}
COPIED = {
    "cycle": lambda: itertools.cycle(iter(range(5))),
    "islice": lambda: itertools.islice(iter(range(50)), 2, 40, 2),
    "chain": lambda: itertools.chain(iter(range(3)), iter([7, 8]), (9, 10)),
    "chain of chains": lambda: itertools.chain.from_iterable(map(range, iter([3, 4, 5]))),
    "takewhile": lambda: itertools.takewhile(partial(int.__gt__, 7), iter(range(9))),
    "accumulate": lambda: itertools.accumulate(iter(range(9))),
    "starmap": lambda: map(int.__add__, iter(range(9)), iter(range(9))),
    "repeat": lambda: itertools.repeat(3, 9),
}
"""Of itertools, which cannot be copied from Python 3.14 on."""

if sys.version_info < (3, 14):
    ITERATORS |= COPIED


@pytest.mark.parametrize("read", [0, 2])
@pytest.mark.parametrize("kind", ITERATORS)
def test_an_iterator_is_not_advanced(kind, read) -> None:
    held, expected = ITERATORS[kind](), ITERATORS[kind]()
    for each in (held, expected):
        for _ in range(read):
            next(each)
    data = Held(held)
    draw(data)
    assert data.held is held
    assert [*itertools.islice(held, 20)] == [*itertools.islice(expected, 20)]


def test_one_is_found_wherever_a_data_set_or_function_holds_it() -> None:
    class Slots:
        __slots__ = ("rows",)

    class Reads(Held):
        of_class = iter(range(100))

        def __iter__(self) -> Iterator[torch.Tensor]:
            for _ in range(3):
                for each in iterators():
                    next(each)
                self.bound()
                self.partial()
                yield torch.zeros(3)

    given = {
        name: iter(range(100)) for name in "list dict tuple slot cell bound partial deque".split()
    }
    given["class"] = Reads.of_class
    data, around = Reads(None), given["cell"]
    data.list, data.dict, data.tuple = [given["list"]], {"a": given["dict"]}, (0, (given["tuple"],))
    data.deque, data.slots = deque([given["deque"]]), Slots()
    data.slots.rows = given["slot"]
    data.bound, data.partial = given["bound"].__next__, partial(next, given["partial"])

    def iterators() -> list[Iterator[int]]:
        found = [data.list[0], data.dict["a"], data.tuple[1][0], data.deque[0], data.slots.rows]
        return [*found, around, Reads.of_class]

    data.iterators = iterators
    draw(data)
    assert {name: next(each) for name, each in given.items()} == dict.fromkeys(given, 0)


def test_iterators_that_share_another_go_on_sharing_it() -> None:
    class Pairs(Held):
        def __iter__(self) -> Iterator[torch.Tensor]:
            for one in self.held:
                assert next(self.other) == one + 1
                yield torch.zeros(3)

    rows = iter(range(10))
    data = Pairs(map(int, rows))
    data.other = rows
    draw(data)
    assert list(rows) == list(range(10))


REFUSED = (
    "which would lose its items by being read: let the data set make a new one each time that it "
    "is read, or pass one batch"
)


@pytest.mark.parametrize(
    "around",
    [
        lambda rows: rows,
        enumerate,
        lambda rows: map(abs, rows),
        lambda rows: zip(rows, range(20), strict=False),
        itertools.pairwise,
        lambda rows: itertools.chain(rows, rows),
    ],
)
@pytest.mark.parametrize("data", [Held, ReadOn])
def test_a_generator_is_refused_before_it_is_read(around, data) -> None:
    rows = (value for value in range(20))
    with pytest.raises(SampleError) as caught:
        draw(data(around(rows)))
    assert str(caught.value).endswith(REFUSED) and f"{data.__name__}.held is a " in str(
        caught.value
    )
    assert list(rows) == list(range(20))


def test_so_it_is_where_the_refusal_is_caught_on_the_way() -> None:
    class Catching(Held):
        def __iter__(self) -> Iterator[torch.Tensor]:
            try:
                yield from super().__iter__()
            except Exception as error:
                if self.raises:
                    raise RuntimeError("no more rows") from error
                yield torch.zeros(3)

    for raises in (True, False):
        rows = (value for value in range(20))
        data = Catching(rows)
        data.raises = raises
        with pytest.raises(SampleError, match=r"Catching\.held is a generator, which would lose"):
            draw(data)
        assert data.held is rows and next(rows) == 0


def test_a_generator_that_is_held_and_not_read_is_no_matter() -> None:
    data = Held([1, 2, 3])
    data.other = (value for value in range(20))
    drawn = draw(data)
    assert drawn.notes == () and next(data.other) == 0


def test_a_loader_s_iterator_that_a_data_set_gives_is_refused() -> None:
    class Given(IterableDataset):
        def __init__(self, rows: Any) -> None:
            self.rows = rows

        def __iter__(self) -> Any:
            return self.rows

    rows = iter(DataLoader([1.0, 2.0, 3.0]))  # type: ignore[arg-type]
    with pytest.raises(SampleError, match=r"Given\.rows is a _SingleProcessDataLoaderIter, which"):
        draw(Given(rows))
    assert len(list(rows)) == 3


def test_what_a_library_s_object_holds_and_was_read_on_is_told_of() -> None:
    held = SimpleNamespace(rows=(value % 2 for value in range(20)))

    class Reads(Held):
        def __iter__(self) -> Iterator[torch.Tensor]:
            for value in self.held.rows:
                yield torch.zeros(value + 1)

    expected = (
        "rows (generator) was read on when 20 items were read: it cannot be "
        "put back, so let training begin with a new one"
    )
    drawn = draw(Reads(held))
    assert len(drawn.notes) == 2 and drawn.notes[1].endswith(expected)


def test_a_pipe_is_told_of() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as pipe:
        with os.fdopen(writing, "w") as file:
            file.write("1\n2\n")
        (note,) = draw(Held(pipe)).notes
    assert note.startswith("Held.held (TextIOWrapper) may have been read on when 2 items")


def test_a_worker_of_a_loader_reads_its_copy_of_a_generator() -> None:
    data = Held(value for value in range(4))
    loader = DataLoader(data, num_workers=1, multiprocessing_context="fork")
    with attributes_kept(loader):
        assert len(list(loader)) == 4
    assert list(data.held) == [0, 1, 2, 3]


# Queues


@pytest.mark.parametrize("kind", [queue.Queue, queue.LifoQueue, queue.PriorityQueue])
def test_a_queue_holds_what_it_held(kind) -> None:
    class Puts(ReadOn):
        def __getitem__(self, index: int) -> torch.Tensor:
            self.held.get()
            self.held.put(index + 5)
            self.held.put(index + 6)
            return torch.zeros(3)

    held: queue.Queue[int] = kind()
    held.put(1)
    held.put(2)
    draw(Puts(held))
    assert held.qsize() == held.unfinished_tasks == 2 and {held.get(), held.get()} == {1, 2}


def test_a_queue_that_another_thread_empties_is_left_to_it() -> None:
    held: queue.Queue[int] = queue.Queue()
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.extend(iter(held.get, -1)), daemon=True)
    thread.start()
    while not held.not_empty._waiters:  # type: ignore[attr-defined]
        pass
    with attributes_kept([held]):
        held.put(1)
        held.put(-1)
        thread.join()
    assert got == [1] and not held.qsize()
