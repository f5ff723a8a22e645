"""Every container that anything walks is walked by the same rules, and keeps its class."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import register_pytree_node

from autobatch.workload.tree import (
    leaves,
    map_leaves,
    map_tensors,
    sized_leaves,
    tensors,
    with_tensors,
)

ONE, TWO = torch.ones(2, 3), torch.ones(2)

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass
class Scaled:
    """Constructed from more than its fields."""

    x: torch.Tensor
    y: torch.Tensor
    scale: dataclasses.InitVar[float]

    def __post_init__(self, scale: float) -> None:
        self.x = self.x * scale


@dataclasses.dataclass
class Derived:
    """Has fields that it is not constructed from."""

    x: torch.Tensor
    y: torch.Tensor = dataclasses.field(init=False)
    rows: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.rows = len(self.x)


class Registered:
    """Says to PyTorch's pytree how it is taken apart."""

    def __init__(self, parts: Any) -> None:
        self.parts = parts


register_pytree_node(
    Registered, lambda node: (node.parts, None), lambda parts, _: Registered(parts)
)


def derived() -> Derived:
    made = Derived(ONE)
    made.y = TWO
    return made


NAMED = [
    {"x": ONE, "y": TWO},
    OrderedDict(x=ONE, y=TWO),
    defaultdict(list, x=ONE, y=TWO),
    UserDict({"x": ONE, "y": TWO}),
    MappingProxyType({"x": ONE, "y": TWO}),
    Pair(ONE, TWO),
    Record(ONE, TWO),
    Frozen(ONE, TWO),
    Scaled(ONE, TWO, 1.0),
    derived(),
    SimpleNamespace(x=ONE, y=TWO),
]
NUMBERED = [[ONE, TWO], (ONE, TWO), deque([ONE, TWO]), Registered([ONE, TWO])]


@pytest.mark.parametrize("node", NAMED, ids=lambda node: type(node).__name__)
def test_parts_of_a_container_with_names_are_named_by_them(node: Any) -> None:
    found = {path: leaf for path, leaf in leaves({"in": node}) if isinstance(leaf, torch.Tensor)}
    assert list(found) == [("in", "x"), ("in", "y")]
    assert torch.equal(found["in", "x"], ONE) and found["in", "y"] is TWO


@pytest.mark.parametrize("node", NUMBERED, ids=lambda node: type(node).__name__)
def test_parts_of_a_container_without_names_are_numbered(node: Any) -> None:
    assert list(leaves(node)) == [(("0",), ONE), (("1",), TWO)]


@pytest.mark.parametrize("node", [*NAMED, *NUMBERED], ids=lambda node: type(node).__name__)
def test_a_container_with_other_tensors_is_a_new_one_of_the_same_class(node: Any) -> None:
    changed = map_tensors(lambda tensor: tensor + 1, node)
    assert type(changed) is type(node) and changed is not node
    assert [tensor.unique().item() for tensor in tensors(changed)] == [2.0, 2.0]
    assert [tensor.unique().item() for tensor in tensors(node)] == [1.0, 1.0]
    other = list(tensors(with_tensors(node, (TWO, ONE))))
    assert other[0] is TWO and other[1] is ONE


def test_what_a_dataclass_derives_follows_its_new_parts() -> None:
    longer = map_tensors(lambda tensor: torch.cat([tensor, tensor]), derived())
    assert (len(longer.x), len(longer.y), longer.rows) == (4, 4, 4)


def test_an_encoding_keeps_what_it_carries_beside_its_items() -> None:
    transformers = pytest.importorskip("transformers")
    encoding = transformers.BatchEncoding({"input_ids": ONE}, n_sequences=1)
    changed = map_tensors(torch.Tensor.double, encoding)
    assert type(changed) is transformers.BatchEncoding and changed.n_sequences == 1
    assert changed.input_ids.dtype is torch.float64 and encoding.input_ids is ONE


@pytest.mark.parametrize(
    "value",
    [["a", "b"], (224, 224), [], "text", 3, None, nn.Linear(2, 2), SimpleNamespace(x=1), Record],
)
def test_what_holds_no_tensor_is_a_leaf_and_stays_the_same_object(value: Any) -> None:
    assert list(leaves({"x": value})) == [(("x",), value)]
    assert map_tensors(torch.Tensor.double, {"x": value})["x"] is value


def test_the_walk_stops_where_it_is_told() -> None:
    def is_list(_path: Any, node: Any) -> bool:
        return isinstance(node, list)

    targets = [{"boxes": ONE}, {"boxes": ONE}]
    batch = {"targets": targets, "x": TWO}
    assert list(leaves(batch, stop=is_list)) == [(("targets",), targets), (("x",), TWO)]
    assert next(path for path, _ in leaves(batch)) == ("targets", "0", "boxes")
    assert map_leaves(lambda path, _: path, batch, stop=is_list) == {
        "targets": ("targets",),
        "x": ("x",),
    }


def test_a_packed_sequence_moves_and_its_batch_sizes_stay() -> None:
    packed = pack_padded_sequence(
        torch.zeros(5, 3, 4), torch.tensor([3, 5, 4]), enforce_sorted=False
    )
    moved = map_tensors(lambda tensor: tensor.to("meta"), packed)
    assert type(moved) is type(packed) and moved.data.is_meta and moved.sorted_indices.is_meta
    assert moved.batch_sizes is packed.batch_sizes


def test_items_of_a_data_set_are_measured_in_all_these_containers() -> None:
    for node in (*NAMED, *NUMBERED[1:]):
        sizes = {path[-1]: size for path, _, size in sized_leaves({"in": node})}
        assert list(sizes.values()) == [24, 8]
