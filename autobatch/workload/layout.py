"""What a batch is made of: which part of every leaf belongs to which sample, and how that is said.

`layout_reading` finds it out. Invariant: what belongs to no sample is listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from autobatch.errors import SampleError
from autobatch.support.wording import listed
from autobatch.workload.tree import Path, leaves

__all__ = [
    "HANDFUL",
    "BatchDims",
    "Flat",
    "Group",
    "Layout",
    "Role",
    "covers",
    "dims_as_text",
    "dims_of_text",
    "dotted",
    "is_named_index",
    "named_tensors",
    "refuse_packed",
    "shapes_of",
]

BatchDims: TypeAlias = "int | str | Mapping[str | int, int | str | None] | None"

HANDFUL = 4
"""Values that may be a size, a colour or a box, and entries that may be fields, but no more."""

_INDEX_NAME = re.compile(r"(^|_)(batch|sample|image|img|graph)(_?(idx|index|indices|ids?))?$")
"""Names of tensors that hold, for each row, the number of its sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Flat rows: all rows of all samples in one dimension.

    Attributes:
        order: positions of the rows, those of the first sample first.
        ends: rows of the first i samples together, for i from 0 to the number of samples.
    """

    order: Tensor
    ends: tuple[int, ...]
    places: Tensor = field(init=False)
    """Where each row is in `order`; made here, as no values can be read in a fake mode."""

    def __post_init__(self) -> None:
        """Invert the order."""
        object.__setattr__(self, "places", torch.argsort(self.order))

    @property
    def rows(self) -> int:
        """Rows of all samples."""
        return self.ends[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """A leaf whose dimension `dim` has the rows of a group.

    Attributes:
        counts: what its values count: "samples", rows of the group of that name, or None.
    """

    dim: int
    group: str
    counts: str | None = None


Role: TypeAlias = "int | Flat"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the samples of a batch lie in it.

    Attributes:
        size: number of samples.
        roles: of each tensor or array with samples: their dimension, or its flat rows.
        lists: paths of lists with one entry for each sample.
        sequences: whether a sequence without tensors has one value for each sample, by path; None
            where it may be by accident that it has as many.
        objects: paths of objects that know their samples themselves.
        groups: the flat rows, by name.
        whole: leaves of which, by `batch_dims`, every part gets all.
        rest: other leaves with dimensions, which belong to no sample.
    """

    size: int
    roles: Mapping[Path, Role] = field(default_factory=dict)
    lists: frozenset[Path] = frozenset()
    sequences: Mapping[Path, bool | None] = field(default_factory=dict)
    objects: frozenset[Path] = frozenset()
    groups: Mapping[str, Group] = field(default_factory=dict)
    whole: frozenset[Path] = frozenset()
    rest: frozenset[Path] = frozenset()

    @property
    def is_made_of_rows(self) -> bool:
        """Whether every sample is a row of tensors, and nothing else."""
        is_plain = all(isinstance(role, int) for role in self.roles.values())
        return is_plain and not (self.lists or self.objects or self.groups)

    def dim(self, path: Path) -> int:
        """Return the batch dimension of a tensor of a layout made of rows."""
        role = self.roles[path]
        assert isinstance(role, int)
        return role

    @property
    def is_told_by_shapes(self) -> bool:
        """Whether a batch of tensors of the same names and shapes has the same layout.

        Values of tensors that number their samples, and of counts, tell of flat rows.
        """
        is_plain = self.is_made_of_rows and not self.rest
        return is_plain and not any(map(is_named_index, self.roles))

    def first(self, samples: int) -> Layout:
        """Return the layout of a batch of the first samples."""
        groups = {
            name: replace(g, order=g.order[: g.ends[samples]].argsort().argsort(),
                          ends=g.ends[: samples + 1])
            for name, g in self.groups.items()
        }  # fmt: skip
        return replace(self, size=samples, groups=groups)

    def stop(self, path: Path, node: Any) -> bool:
        """Say whether a container is taken as a leaf: its entries are samples."""
        is_part = path in self.lists or path in self.sequences or path in self.objects
        return is_part or isinstance(node, PackedSequence)


def named_tensors(batch: Any) -> dict[Path, Tensor]:
    """Return all tensors of a batch by their path, such as ("inputs", "0").

    Raises:
        SampleError: one of them is packed.
    """
    found = {}
    for path, leaf in leaves(batch, stop=lambda _, node: isinstance(node, PackedSequence)):
        refuse_packed(leaf)
        if isinstance(leaf, Tensor):
            found[path] = leaf
    return found


def dims_as_text(batch_dims: BatchDims) -> dict[str, str] | None:
    """Write `batch_dims` down by path, "" for the whole batch, as a plan keeps them.

    >>> dims_as_text({"src": 1, 0: None, "images": "list"}), dims_as_text(1)
    ({'src': '1', '0': 'whole', 'images': 'list'}, {'*': '1'})
    """
    if batch_dims is None:
        return None
    named: Mapping[Any, Any]
    if isinstance(batch_dims, Mapping):
        named = batch_dims
    else:
        named = {"*" if isinstance(batch_dims, int) else "": batch_dims}
    return {str(key): "whole" if dim is None else str(dim) for key, dim in named.items()}


def dims_of_text(written: Mapping[str, str] | None) -> BatchDims:
    """Read what `dims_as_text` wrote.

    >>> dims_of_text({"src": "1", "0": "whole", "images": "list"}), dims_of_text({"*": "1"})
    ({'src': 1, '0': None, 'images': 'list'}, 1)
    """
    if written is None:
        return None
    if "*" in written:
        return int(written["*"])
    return {
        key: None if dim == "whole" else dim if dim == "list" else int(dim)
        for key, dim in written.items()
    }


def covers(key: str | int, path: Path) -> bool:
    """Say whether a key of `batch_dims` is a tensor's path, or its beginning or end."""
    if key == "":
        return not path
    parts = tuple(str(key).split("."))
    return path[: len(parts)] == parts or path[-len(parts) :] == parts


def dotted(path: Path) -> str:
    """Return a leaf's name as `batch_dims` takes it."""
    return ".".join(path) or "the sample"


def shapes_of(found: Mapping[Path, Any]) -> str:
    """Describe tensors in one line."""
    shown = [f"{dotted(path)} {tuple(leaf.shape)}" for path, leaf in found.items()]
    return listed(shown, 8) or "no tensors"


def is_named_index(path: Path) -> bool:
    """Say whether a leaf is called as one that holds the number of each row's sample."""
    return bool(path) and _INDEX_NAME.search(path[-1]) is not None


def refuse_packed(leaf: Any) -> None:
    """Refuse sequences that were packed.

    Raises:
        SampleError: this is one.
    """
    if isinstance(leaf, PackedSequence):
        raise SampleError(
            "a PackedSequence cannot be resized: pass the padded tensor and the lengths, or a "
            "Workload with its own batch function"
        )
