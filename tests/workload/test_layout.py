"""What belongs to which sample: lists, flat rows, objects; two readings are an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from autobatch.errors import SampleError
from autobatch.workload.sample import batch_builder, rows_of
from autobatch.workload.tree import tensors


def detection(counts: list[int], channels: int = 3) -> tuple[Any, Any]:
    images = [torch.rand(channels, 8, 8) for _ in counts]
    targets = [{"boxes": torch.rand(c, 4), "labels": torch.ones(c)} for c in counts]
    return images, targets


def flat(counts: list[int]) -> dict[str, torch.Tensor]:
    rows = sum(counts)
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return {
        "img": torch.rand(len(counts), 3, 8, 8),
        "bboxes": torch.rand(rows, 4),
        "batch_idx": owners.float(),
    }


class Graphs:
    """Holds tensors as attributes, moves, and has a length, as batches of graphs do."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        vars(self).update(tensors)

    def __len__(self) -> int:
        return len(vars(self))

    def __getitem__(self, name: str) -> torch.Tensor:
        return getattr(self, name)

    def to(self, device: str) -> Graphs:
        return Graphs(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def graphs() -> Graphs:
    return Graphs(
        x=torch.rand(6, 4),
        edge_index=torch.tensor([[0, 1, 3, 4], [1, 2, 4, 5]]),
        batch=torch.tensor([0, 0, 0, 1, 1, 1]),
        y=torch.zeros(2),
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_of_images_and_targets_are_the_batch_and_channels_are_not(channels, kind):
    sample = tuple(map(kind, detection([3, 1, 3], channels)))
    images, targets = batch_builder(sample)(5)
    assert type(images) is kind and len(images) == len(targets) == 5
    assert images[4].shape == (channels, 8, 8) and [len(t["boxes"]) for t in targets][:3] == [
        3,
        1,
        3,
    ]


def test_token_rows_of_unequal_length_are_samples():
    rows = rows_of(([torch.zeros(n) for n in (7, 7, 7, 2)],))
    assert rows.size == 4 and [len(row) for row in rows.cut(2, 4)[0]] == [7, 2]


def test_feature_dicts_are_views_of_the_batch():
    features = [{"input_ids": torch.zeros(6, n, dtype=torch.long)} for n in (9, 12)]
    for sample in (features, (features, torch.zeros(6))):
        built = batch_builder(sample)(4)
        views = built[0] if isinstance(built, tuple) else built
        assert [tuple(view["input_ids"].shape) for view in views] == [(4, 9), (4, 12)]


def test_flat_rows_follow_the_index_of_their_sample():
    built = batch_builder(flat([2, 1]))(3)
    assert built["img"].shape[0] == 3 and built["bboxes"].shape[0] == 5
    assert built["batch_idx"].tolist() == [0, 0, 1, 2, 2]


def test_nodes_and_edges_of_graphs_follow_their_graph():
    built = batch_builder(graphs())(3)
    assert type(built) is Graphs and len(built.y) == 3
    assert built.batch.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert built.edge_index.tolist() == [[0, 1, 3, 4, 6, 7], [1, 2, 4, 5, 7, 8]]
    assert rows_of(built).cut(2, 3).edge_index.tolist() == [[0, 1], [1, 2]]


def test_arrays_are_rows_like_tensors():
    built = batch_builder({"x": np.arange(6.0).reshape(3, 2), "y": torch.zeros(3)})(4)
    assert built["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert rows_of(built).cut(1, 3)["x"].tolist() == [[2, 3], [4, 5]]


def test_a_collate_function_shows_where_the_batch_is():
    def time_first(items: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack(items, 1), torch.cat([torch.zeros(5, 2) for _ in items])

    steps, boxes = batch_builder(DataLoader([torch.zeros(7, 4)] * 8, collate_fn=time_first))(3)
    assert steps.shape == (7, 3, 4) and boxes.shape == (15, 2)


@pytest.mark.parametrize(
    "sample",
    [
        (torch.zeros(7, 2, 5), torch.zeros(2)),
        (torch.zeros(7, 2, 5), torch.zeros(7, 2, 5), torch.zeros(2)),
        [torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)],
        {"x": torch.zeros(10, 3), "y": torch.zeros(10), "class_weights": torch.zeros(10)},
        {"x": torch.zeros(2, 3), "table": torch.zeros(9, 50), "y": torch.zeros(2)},
    ],
)
def test_two_readings_and_much_that_is_not_scaled_ask_for_batch_dims(sample):
    with pytest.raises(SampleError, match="batch_dims=") as caught:
        batch_builder(sample)
    assert "\n" not in str(caught.value)


def test_batch_dims_says_that_a_list_is_the_batch():
    images = [torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)]
    assert len(batch_builder(images, batch_dims="list")(5)) == 5
    assert batch_builder(images, batch_dims=0)(5)[0].shape == (5, 8, 8)


def test_a_sparse_tensor_is_refused_by_name():
    with pytest.raises(SampleError, match="x is a sparse_coo tensor"):
        batch_builder({"x": torch.eye(3).to_sparse()})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_by_name_wherever_it_is():
    nested = torch.nested.nested_tensor([torch.zeros(3, 5), torch.zeros(2, 5)])
    for sample in ({"x": nested}, {"x": [nested, nested]}, {"x": [(nested, 1)]}):
        with pytest.raises(SampleError, match=r"x(\.0)* is a nested tensor, which cannot be cut"):
            batch_builder({**sample, "y": torch.zeros(2)})


@given(
    counts=st.lists(st.integers(1, 4), min_size=2, max_size=5), n=st.integers(1, 9), data=st.data()
)
def test_pieces_of_a_built_batch_are_the_samples_it_was_built_from(counts, n, data):
    sample = {**flat(counts), "nested": (detection(counts), {"text": ["a"] * len(counts)})}
    original, rows = rows_of(sample), rows_of(batch_builder(sample)(n))
    assert (original.size, rows.size) == (len(counts), n)
    at = data.draw(st.integers(0, n - 1))
    piece, one = rows.cut(at, at + 1), original.cut(at % len(counts), at % len(counts) + 1)
    pairs = list(zip(tensors(piece), tensors(one), strict=True))
    assert pairs and all(torch.equal(a, b) for a, b in pairs)


class GraphBatch:
    """Knows its graphs itself, as a batch of PyTorch Geometric does."""

    def __init__(self, nodes: list[torch.Tensor]) -> None:
        self.nodes = nodes

    def to_data_list(self) -> list[torch.Tensor]:
        return self.nodes

    @classmethod
    def from_data_list(cls, nodes: list[torch.Tensor]) -> GraphBatch:
        return cls(list(nodes))


class TensorDict:
    """Tensors with a batch size of their own, indexed by rows, as a TensorDict is."""

    batch_dims = 1

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    @property
    def batch_size(self) -> torch.Size:
        return next(iter(self.tensors.values())).shape[:1]

    def __getitem__(self, rows: list[int]) -> TensorDict:
        return TensorDict({name: tensor[rows] for name, tensor in self.tensors.items()})


def test_objects_that_know_their_samples_take_and_join_them_by_their_own_functions() -> None:
    nodes = [torch.rand(3, 4), torch.rand(5, 4)]
    made = batch_builder(GraphBatch(nodes))(5)
    assert [part.shape[0] for part in made.nodes] == [3, 5, 3, 5, 3]
    built = batch_builder({"data": TensorDict({"x": torch.rand(2, 6)})})(7)["data"]
    assert isinstance(built, TensorDict) and built.tensors["x"].shape == (7, 6)
