"""Batches of any size keep the sample's structure, dtypes, values and memory format."""

from __future__ import annotations

import dataclasses
import random
from collections import UserDict, namedtuple
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from autobatch.errors import SampleError
from autobatch.workload.complete import Asked
from autobatch.workload.dataset import draw
from autobatch.workload.sample import batch_builder, built, rows_of

Pair = namedtuple("Pair", "image label")


@dataclasses.dataclass(frozen=True)
class Record:
    image: torch.Tensor
    label: torch.Tensor
    name: str = "record"


class Plain:
    def __init__(self) -> None:
        self.image = torch.zeros(2, 3)
        self.label = torch.zeros(2)
        self.name = "plain"


class Noisy(Dataset):
    """Items of growing length, drawn from the global generators."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
        return torch.rand(index + 1), random.random()


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(torch.arange(20.0).reshape(10, 2))


def pad(items: list[tuple[torch.Tensor, float]]) -> dict[str, torch.Tensor]:
    rows = torch.nn.utils.rnn.pad_sequence([row for row, _ in items], batch_first=True)
    return {"rows": rows, "labels": torch.tensor([label for _, label in items])}


@given(
    rows=st.integers(1, 5),
    n=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_every_row_of_a_batch_is_the_row_of_the_sample_at_its_place(rows, n, dtype):
    sample = torch.randint(0, 2, (rows, 3)).to(dtype)
    batch = batch_builder(sample)(n)
    assert batch.dtype is dtype and batch.is_contiguous()
    assert torch.equal(batch, torch.stack([sample[row % rows] for row in range(n)]))


@pytest.mark.parametrize(
    "sample",
    [
        {"image": torch.zeros(2, 3), "label": torch.zeros(2), "name": "x"},
        UserDict({"image": torch.zeros(2, 3), "label": torch.zeros(2), "name": "x"}),
        (torch.zeros(2, 3), torch.zeros(2)),
        [torch.zeros(2, 3), torch.zeros(2), None],
        Pair(torch.zeros(2, 3), torch.zeros(2)),
        Record(torch.zeros(2, 3), torch.zeros(2)),
        Plain(),
        {"nested": [(torch.zeros(2, 3), {"label": torch.zeros(2)})]},
    ],
    ids=lambda sample: type(sample).__name__,
)
def test_containers_of_any_kind_keep_their_type_and_get_n_rows(sample):
    batch = batch_builder(sample)(5)
    assert type(batch) is type(sample)
    tensors = [leaf for leaf in _leaves(batch) if isinstance(leaf, torch.Tensor)]
    assert [tuple(tensor.shape) for tensor in tensors] == [(5, 3), (5,)]
    assert [leaf for leaf in _leaves(sample) if isinstance(leaf, str)] == [
        leaf for leaf in _leaves(batch) if isinstance(leaf, str)
    ]


def _leaves(node: Any) -> list[Any]:
    if isinstance(node, (dict, UserDict)):
        return [leaf for part in node.values() for leaf in _leaves(part)]
    if isinstance(node, (list, tuple)):
        return [leaf for part in node for leaf in _leaves(part)]
    if isinstance(node, (Record, Plain)):
        return [leaf for part in vars(node).values() for leaf in _leaves(part)]
    return [node]


def test_a_sample_that_was_built_from_is_left_as_it_was():
    sample = {"x": torch.ones(2, 3)}
    batch = batch_builder(sample)(2)
    batch["x"].zero_()
    assert sample["x"].shape == (2, 3) and bool(sample["x"].all())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_tensor_in_a_batch_that_is_cut_is_an_error_of_one_line(layout):
    sparse = torch.eye(4).to_sparse(layout=layout)
    kind = str(layout).removeprefix("torch.")
    with pytest.raises(SampleError) as caught:
        rows_of((sparse, torch.zeros(4))).cut(0, 2)
    assert str(caught.value) == (
        f"a batch of 4 samples has to be cut, but 0 is a {kind} tensor, which cannot be: let the "
        "loader yield micro-batches, or make it dense"
    )


def test_a_billion_rows_inside_a_fake_mode_allocate_nothing():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    build = batch_builder({"x": torch.zeros(2, 3, 8, 8), "scale": torch.ones(())})
    with FakeTensorMode():
        batch = build(10**9)
    assert batch["x"].shape == (10**9, 3, 8, 8)
    assert isinstance(batch["x"], FakeTensor) and isinstance(batch["scale"], FakeTensor)


def test_channels_last_samples_make_channels_last_batches():
    sample = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    batch = batch_builder(sample)(5)
    assert batch.is_contiguous(memory_format=torch.channels_last) and not batch.is_contiguous()
    assert torch.equal(batch[2:4], sample)


def test_leaves_that_require_grad_stay_leaves_that_require_grad():
    batch = batch_builder((torch.rand(2, 3, requires_grad=True), torch.rand(2)))(4)
    assert batch[0].requires_grad and batch[0].is_leaf and not batch[1].requires_grad


def test_a_sample_on_meta_gives_real_zeros_on_the_cpu():
    batch = batch_builder(torch.empty(2, 3, device="meta", dtype=torch.int64))(4)
    assert torch.equal(batch, torch.zeros(4, 3, dtype=torch.int64))


def test_the_size_that_most_tensors_share_is_the_batch():
    sample = {"x": torch.zeros(4, 3), "weights": torch.zeros(9), "y": torch.zeros(4)}
    batch = batch_builder(sample)(6)
    assert {key: len(leaf) for key, leaf in batch.items()} == {"x": 6, "weights": 9, "y": 6}


def test_of_sizes_equally_frequent_none_is_taken_before_it_was_asked_for():
    sample = torch.zeros(4, 3), torch.zeros(9)
    with pytest.raises(SampleError, match=r"two ways, as 4 samples or 9 .*batch_dims="):
        batch_builder(sample)
    batch = batch_builder(sample, batch_dims={0: 0, 1: None})(6)
    assert [len(leaf) for leaf in batch] == [6, 9]


def test_batch_dims_names_the_dimension_of_single_tensors():
    sample = {"src": torch.zeros(7, 2), "y": torch.zeros(2), "table": torch.zeros(2, 5)}
    batch = batch_builder(sample, batch_dims={"src": 1, "table": None})(6)
    shapes = {key: tuple(leaf.shape) for key, leaf in batch.items()}
    assert shapes == {"src": (7, 6), "y": (6,), "table": (2, 5)}


def test_batch_dims_reaches_nested_tensors_by_path_or_by_either_end():
    sample = ({"src": torch.zeros(7, 2)}, torch.zeros(2))
    for key in ("0.src", "src", 0):
        batch = batch_builder(sample, batch_dims={key: 1})(6)
        assert batch[0]["src"].shape == (7, 6) and batch[1].shape == (6,)


def test_one_batch_dim_holds_for_all_tensors_that_have_it():
    sample = (torch.zeros(7, 2, 5), torch.zeros(7, 2), torch.zeros(7))
    batch = batch_builder(sample, batch_dims=1)(6)
    assert [tuple(leaf.shape) for leaf in batch] == [(7, 6, 5), (7, 6), (7,)]


def test_lists_of_one_object_per_sample_are_repeated_and_sizes_are_not():
    sample = {"x": torch.zeros(2, 3), "text": ["a", "b"], "names": ("a", "b"), "size": (4, 4, 3)}
    batch = batch_builder(sample)(3)
    assert batch["text"] == ["a", "b", "a"] and batch["names"] == ("a", "b", "a")
    assert batch["size"] == (4, 4, 3)


@pytest.mark.parametrize(
    ("sample", "batch_dims", "words"),
    [
        ({"ids": [[1, 2], [3, 4]]}, None, "no tensor with a batch dimension"),
        (torch.tensor(1.0), None, "no tensor with a batch dimension"),
        ({"x": torch.zeros(0, 3)}, None, "the sample's batch is empty"),
        ({"x": torch.zeros(2, 3)}, {"y": 1}, "x (2, 3)"),
        ({"x": torch.zeros(2, 3)}, {"x": 2}, "in dimension 2"),
        ((torch.zeros(2, 3), torch.zeros(4)), {0: 1, 1: 0}, "different batch sizes, [3, 4]"),
        (iter([torch.zeros(2)]), None, "would lose a batch"),
        (TensorDataset(torch.zeros(0, 3)), None, "the data set is empty"),
        (pack_padded_sequence(torch.zeros(3, 2, 1), [3, 2]), None, "PackedSequence"),
    ],
)
def test_samples_without_a_usable_batch_are_refused_in_one_line(sample, batch_dims, words):
    with pytest.raises(SampleError) as caught:
        batch_builder(sample, batch_dims=batch_dims)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_largest_item_of_a_data_set_is_collated():
    rows, labels = batch_builder(Noisy())(3)
    assert rows.shape == (3, 10) and labels.shape == (3,)


def test_a_loader_is_drawn_from_with_its_collate_function_and_without_its_workers():
    loader = DataLoader(Noisy(), batch_size=4, collate_fn=pad, num_workers=2)
    batch = batch_builder(loader)(3)
    assert batch["rows"].shape == (3, 10) and batch["labels"].shape == (3,)


def test_a_loader_of_ready_batches_is_not_collated_again():
    loader = DataLoader(TensorDataset(torch.zeros(3, 4, 5)), batch_size=None)
    assert batch_builder(loader)(7)[0].shape == (7, 5)


def test_a_stream_of_samples_is_collated():
    assert batch_builder(DataLoader(Stream(), batch_size=2))(3).shape == (3, 2)


def test_drawing_from_a_data_set_leaves_the_random_state_as_it_was():
    torch.manual_seed(0)
    random.seed(0)
    expected = torch.rand(1), random.random()
    torch.manual_seed(0)
    random.seed(0)
    batch_builder(Noisy())
    assert (torch.rand(1), random.random()) == expected


def test_a_sample_is_looked_through_once_for_all_that_a_workload_needs():
    reads: SimpleQueue[int] = SimpleQueue()  # a number of the class would be put back

    class Counted(Noisy):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
            reads.put(index)
            return super().__getitem__(index)

    loader = DataLoader(Counted(), batch_size=4, collate_fn=pad)
    workload = Asked(model=torch.nn.Linear(10, 1), sample=loader).workload()
    assert workload.batch(3)["rows"].shape == (3, 10)
    assert reads.qsize() == workload.sample_limit == 10
    assert "dataset[9]" in workload.notes[0]


def test_one_batch_has_no_limit_and_no_notes():
    drawn = draw((torch.zeros(7, 2), torch.zeros(2)))
    assert built(drawn, {0: 1})(5)[0].shape == (7, 5)
    assert drawn.limit is None and drawn.notes == ()


def test_rows_of_a_batch_padded_to_several_items_are_all_as_long():
    items = [(torch.ones(2), torch.ones(9)), (torch.ones(8), torch.ones(4))]

    def pad_both(items: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        columns = zip(*items, strict=True)
        return tuple(torch.nn.utils.rnn.pad_sequence(c, batch_first=True) for c in columns)

    source, target = batch_builder(DataLoader(items, collate_fn=pad_both))(5)
    assert source.shape == (5, 8) and target.shape == (5, 9)


def test_outputs_and_encodings_of_transformers_keep_their_types():
    transformers = pytest.importorskip("transformers")
    encoding = transformers.BatchEncoding({"input_ids": torch.zeros(2, 8, dtype=torch.int64)})
    batch = batch_builder(encoding)(5)
    assert type(batch) is transformers.BatchEncoding and batch.input_ids.shape == (5, 8)
    assert encoding.input_ids.shape == (2, 8)

    from transformers.modeling_outputs import BaseModelOutput

    output = batch_builder(BaseModelOutput(last_hidden_state=torch.zeros(2, 3)))(5)
    assert output.last_hidden_state.shape == output[0].shape == (5, 3)
