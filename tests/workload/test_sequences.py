"""Sequences without tensors are cut with the samples where they are theirs, and asked about."""

from __future__ import annotations

from array import array
from collections import UserList, deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import autobatch
from autobatch.errors import SampleError
from autobatch.workload.sample import batch_builder, rows_of

X = torch.zeros(8, 3)
THINGS = [SimpleNamespace(weight=i) for i in range(8)]


@pytest.mark.parametrize(
    "values",
    [
        tuple(float(i) for i in range(8)),
        tuple((i, 3) for i in range(8)),
        tuple(None if i % 2 else i for i in range(8)),
        tuple(THINGS),
        list(range(8)),
        deque(range(8)),
        array("d", range(8)),
        range(2, 10),
        UserList(range(8)),
    ],
    ids=lambda values: type(values).__name__,
)
def test_a_sequence_with_a_value_for_each_sample_is_cut_and_repeated_with_them(values) -> None:
    sample = {"x": X, "values": values}
    cut = rows_of(sample).cut(2, 5)["values"]
    assert type(cut) is type(values) and list(cut) == list(values)[2:5]
    built = batch_builder(sample)(9)["values"]
    assert list(built) == [*values, next(iter(values))]


def test_columns_of_pandas_are_cut_by_their_rows() -> None:
    pandas = pytest.importorskip("pandas")
    column = pandas.Series([float(i) for i in range(8)], index=range(10, 18))
    assert rows_of((X, column)).cut(2, 4)[1].tolist() == [2.0, 3.0]
    assert batch_builder((X, column))(9)[1].tolist()[-2:] == [7.0, 0.0]


def test_a_short_tuple_of_numbers_is_asked_about_and_never_guessed() -> None:
    sample = {"x": torch.zeros(2, 3, 224, 224), "size": (224, 224)}
    rows = rows_of(sample)
    assert rows.cut(0, 2)["size"] == (224, 224)
    for refused in (lambda: rows.cut(0, 1), lambda: batch_builder(sample)):
        with pytest.raises(SampleError, match=r"size is a tuple of 2 values beside 2 samples") as e:
            refused()
        assert "\n" not in str(e.value)
    assert rows_of(sample, batch_dims={"size": None}).cut(0, 1)["size"] == (224, 224)
    assert rows_of(sample, batch_dims={"size": "list"}).cut(0, 1)["size"] == (224,)
    with pytest.raises(SampleError, match="has an entry for each sample, but it has 2"):
        rows_of({**sample, "x": X}, batch_dims={"size": "list"})


@pytest.mark.parametrize("values", [torch.Size([2, 3]), "ab", b"ab"])
def test_shapes_and_texts_belong_to_no_sample(values) -> None:
    assert rows_of((torch.zeros(2, 3), values)).cut(0, 1)[1] == values


def test_a_collate_function_shows_what_grows_with_the_samples() -> None:
    data = [(torch.zeros(3), float(i)) for i in range(8)]

    def collate(items: list[Any]) -> Any:
        x, weights = zip(*items, strict=True)
        return torch.stack(x), weights, (1,) * 6, (224, 224)

    built = batch_builder(DataLoader(data, collate_fn=collate))(3)  # type: ignore[arg-type]
    assert len(built[1]) == 3 and built[2:] == ((1,) * 6, (224, 224))


def batch(samples: int, size: Any) -> Any:
    return torch.ones(samples, 3), torch.ones(samples), size


def cuts(*batches: Any, **options: Any) -> list[Any]:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    for window in autobatch.windows(
        batches, optimizer, micro_batch=1, accumulation_steps=2, **options
    ):
        for part in window:
            seen.append(part[2])
            window.backward(model(part[0]).mean())
        window.step()
    return seen


def test_batches_before_tell_what_a_last_one_of_few_samples_has() -> None:
    assert set(cuts(batch(6, (224, 224)), batch(2, (224, 224)))) == {(224, 224)}
    assert cuts(batch(6, tuple(range(6))), batch(2, (6, 7)))[-1] == (7,)


def test_a_constant_with_by_chance_as_many_values_as_the_first_batch_has_samples_is_refused() -> (
    None
):
    with pytest.raises(SampleError, match="a batch before had as many of them as samples"):
        cuts(batch(6, (1,) * 6), batch(4, (1,) * 6))
    assert set(cuts(batch(6, (1,) * 6), batch(4, (1,) * 6), batch_dims={"2": None})) == {(1,) * 6}
