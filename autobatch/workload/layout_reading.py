"""Finds out which part of every leaf of a batch belongs to which sample.

Invariant: this module alone decides it, for building, cutting and counting. Where a batch can be
read in two ways it is an error that shows both, never the first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autobatch.errors import SampleError
from autobatch.support.torch_private import detect_fake_mode
from autobatch.support.wording import for_reader
from autobatch.workload.batch_objects import BatchObject, batch_object
from autobatch.workload.layout import (
    BatchDims,
    Flat,
    Group,
    Layout,
    Role,
    dotted,
    is_named_index,
    refuse_packed,
    shapes_of,
)
from autobatch.workload.tree import Path, is_array, leaves

__all__ = ["compared", "layout_of"]

_OF_SAMPLES = re.compile(r"box|mask|label|area|keypoint|segment|image_id|polygon")
_OF_VIEWS = re.compile(r"input_ids|attention|token|pixel_values|embedding|position_ids")
_CHANNELS = (1, 3, 4)


def layout_of(batch: Any, batch_dims: BatchDims = None) -> Layout:
    """Find the samples of a batch.

    Raises:
        SampleError: there are none, or they can be read in two ways.
    """
    return _Reading(batch, batch_dims).layout()


def compared(one: Any, samples: int, other: Any, others: int) -> Layout | None:
    """Find the samples by two batches of different sizes, made by one function.

    A dimension that grows with the samples is theirs, whatever its size; one that grows by several
    rows a sample has flat rows.

    Returns:
        None where what differs between them is not explained by the number of samples.
    """
    lists = frozenset(path for path, a, b in _sequences(one, other) if len(a) != len(b))
    left = dict(leaves(one, stop=lambda path, _: path in lists))
    right = dict(leaves(other, stop=lambda path, _: path in lists))
    if batch_object(one) is not None or left.keys() != right.keys():
        return None
    if any((len(left[path]), len(right[path])) != (samples, others) for path in lists):
        return None
    roles: dict[Path, Role] = {}
    groups: dict[str, Group] = {}
    arrays = {path: leaf for path, leaf in left.items() if path not in lists and is_array(leaf)}
    for path, leaf in arrays.items():
        twin = right[path]
        if not is_array(twin) or len(twin.shape) != len(leaf.shape):
            return None
        changed = [d for d, rows in enumerate(leaf.shape) if rows != twin.shape[d]]
        if len(changed) > 1:
            return None
        for dim in changed:
            rows = int(leaf.shape[dim])
            if rows * others != int(twin.shape[dim]) * samples:
                return None
            roles[path] = dim
            if rows != samples:
                ends = tuple(rows * i // samples for i in range(samples + 1))
                groups[dotted(path)] = Group(order=torch.arange(rows), ends=ends)
                roles[path] = Flat(dim=dim, group=dotted(path))
    if not roles and not lists:
        return None
    known_groups, known = _Reading(one, None).flat(arrays, samples)
    return Layout(
        size=samples,
        roles=roles | known,
        lists=lists,
        groups=groups | known_groups,
        rest=frozenset(path for path, leaf in arrays.items() if path not in roles and leaf.shape),
    )


def _sequences(one: Any, other: Any) -> Iterator[tuple[Path, Any, Any]]:
    """Yield the lists and tuples that two batches have in the same places."""
    twins: dict[Path, Any] = {}

    def note(path: Path, node: Any) -> bool:
        if isinstance(node, (list, tuple)):
            twins[path] = node
        return False

    list(leaves(one, stop=note))
    first, twins = twins, {}
    list(leaves(other, stop=note))
    for path, node in first.items():
        if path in twins:
            yield path, node, twins[path]


@dataclass(slots=True)
class _Listed:
    """A sequence of tensors or of mappings, which may be samples or fields."""

    path: Path
    node: Sequence[Any]
    inner: dict[Path, Any]
    same_keys: bool

    @property
    def length(self) -> int:
        return len(self.node)

    @property
    def of_tensors(self) -> bool:
        return is_array(self.node[0])

    @property
    def common(self) -> int | None:
        """The first dimension that all tensors have; None where they differ."""
        firsts = {leaf.shape[0] if len(leaf.shape) else None for leaf in self.inner.values()}
        return firsts.pop() if len(firsts) == 1 else None

    @property
    def looks_like_images(self) -> bool:
        return any(len(a.shape) == 3 and a.shape[0] in _CHANNELS for a in self.inner.values())

    def named(self, names: re.Pattern[str]) -> bool:
        return any(names.search(path[-1]) for path in self.inner if path)


class _Reading:
    """One batch, while it is found out what it is made of."""

    def __init__(self, batch: Any, batch_dims: BatchDims) -> None:
        self.batch = batch
        self.stated: dict[Path, int | str | None] = {}
        self.default = batch_dims if isinstance(batch_dims, int) else 0
        self.is_of_fields = isinstance(batch_dims, int)
        self.objects: dict[Path, BatchObject] = {}
        self.candidates: list[_Listed] = []
        self.texts: list[tuple[Path, Any]] = []
        self.lists: set[Path] = set()
        self.fields: dict[Path, Any] = {}
        self._scan()
        self._state(batch_dims)

    def _scan(self) -> None:
        """Find the objects, the sequences that may be samples, and all other leaves."""

        def look(path: Path, node: Any) -> bool:
            refuse_packed(node)
            found = batch_object(node)
            if found is not None:
                self.objects[path] = found
                return True
            if _may_be_samples(node):
                inner = {(str(i), *rest): leaf for i, item in enumerate(node)
                         for rest, leaf in leaves(item) if is_array(leaf)}  # fmt: skip
                keys = {tuple(map(str, item)) if isinstance(item, Mapping) else () for item in node}
                self.candidates.append(_Listed(path, node, inner, len(keys) == 1))
                return True
            return False

        for path, leaf in leaves(self.batch, stop=look):
            if is_array(leaf):
                self.fields[path] = leaf
            elif _is_texts(leaf):
                self.texts.append((path, leaf))

    def _state(self, batch_dims: BatchDims) -> None:
        given: Mapping[Any, Any] = batch_dims if isinstance(batch_dims, Mapping) else {}
        if isinstance(batch_dims, str):
            given = {"": batch_dims}
        known = {**self.fields, **{c.path: c.node for c in self.candidates}}
        for candidate in self.candidates:  # by name, for those that are fields after all
            known |= {(*candidate.path, *path): leaf for path, leaf in candidate.inner.items()}
        for key, dim in given.items():
            covered = [path for path in known if _covers(key, path)]
            if not covered:
                raise SampleError(
                    f"batch_dims names {key!r}, but the sample's tensors are "
                    f"{shapes_of({p: leaf for p, leaf in known.items() if is_array(leaf)})}"
                )
            for path in covered:
                self.stated.setdefault(path, dim)

    def layout(self) -> Layout:
        for candidate in self.candidates:
            if self._is_samples(candidate):
                self.lists.add(candidate.path)
            else:
                self.fields |= {
                    (*candidate.path, *path): leaf for path, leaf in candidate.inner.items()
                }
        fields = {path: leaf for path, leaf in self.fields.items() if len(leaf.shape)}
        for path, leaf in fields.items():
            _refuse_sparse(path, leaf)
        if not fields and not self.lists and not self.objects:
            raise SampleError(
                f"the sample has no tensor with a batch dimension ({shapes_of(self.fields)}): "
                f"{_one_batch()}"
            )
        dims, votes = self._dims(fields)
        lengths = {c.length for c in self.candidates if c.path in self.lists}
        lengths |= {found.size for found in self.objects.values()}
        if len(lengths) > 1:
            raise self._asks(f"lists of {' and '.join(map(str, sorted(lengths)))} samples")
        size = lengths.pop() if lengths else self._voted(fields, dims, votes)
        if size == 0:
            raise SampleError(
                f"the sample's batch is empty ({shapes_of(fields)}): pass a batch of one or more "
                "samples"
            )
        whole = frozenset(path for path, dim in self.stated.items() if dim is None)
        groups, roles = self.flat(fields, size)
        for path, dim in dims.items():
            if path not in roles and fields[path].shape[dim] == size:
                roles[path] = dim
        return Layout(
            size=size,
            roles=roles,
            lists=frozenset(self.lists),
            objects=frozenset(self.objects),
            groups=groups,
            whole=whole,
            rest=frozenset(fields.keys() - roles.keys() - whole),
        )

    # Lists

    def _is_samples(self, seq: _Listed) -> bool:
        """Say whether the length of a list is the batch, by what else the batch has."""
        stated = self.stated.get(seq.path)
        if stated == "list":
            return True
        if (
            (self.is_of_fields and seq.of_tensors and not seq.path)
            or seq.path in self.stated
            or any((*seq.path, *path) in self.stated for path in seq.inner)
        ):
            return False
        common, length = seq.common, seq.length
        flat = {
            leaf.shape[0]
            for path, leaf in self.fields.items()
            if is_named_index(path) and leaf.shape
        }
        plain = {leaf.shape[0] for leaf in self.fields.values() if len(leaf.shape)} - flat
        twins = any(c is not seq and c.length == length for c in self.candidates)
        twins |= any(len(text) == length for _, text in self.texts)
        is_root = not seq.path
        if common is None:
            if is_root and seq.of_tensors:
                return self._root_of_tensors(seq)
            return True
        by_length = twins or length in plain or length in self._counted()
        by_rows = common in plain and common != length
        both = common == length and common in plain and not twins
        if twins and not by_rows:
            return not (seq.named(_OF_VIEWS) and common in plain)
        if by_length and (by_rows or both):
            if seq.named(_OF_SAMPLES) != seq.named(_OF_VIEWS):
                return seq.named(_OF_SAMPLES)
            raise self._asks_list(seq)
        if by_length or by_rows:
            return by_length
        if seq.of_tensors:
            if is_root and isinstance(seq.node, list) and seq.looks_like_images and length > 1:
                raise self._asks_list(seq)
            return not is_root and isinstance(seq.node, list)
        if not seq.same_keys or seq.named(_OF_VIEWS):
            return False
        if seq.named(_OF_SAMPLES) or seq.looks_like_images:
            return True
        if length > 1 and max(len(leaf.shape) for leaf in seq.inner.values()) < 2:
            raise self._asks_list(seq)
        return False

    def _root_of_tensors(self, seq: _Listed) -> bool:
        """Say whether a bare list of tensors of unequal length is one of samples."""
        kinds = {(len(leaf.shape), leaf.dtype) for leaf in seq.inner.values()}
        if len(kinds) > 1 or isinstance(seq.node, tuple):
            return False
        raise self._asks_list(seq)

    def _counted(self) -> set[int]:
        """Return the numbers of samples that tensors named as an index of their sample count."""
        found = set()
        for path, leaf in self.fields.items():
            if is_named_index(path) and (top := _top_index(leaf)) is not None:
                found.add(top + 1)
        return found

    # Dimensions

    def _dims(self, fields: Mapping[Path, Any]) -> tuple[dict[Path, int], Counter[int]]:
        """Return the dimension of every tensor that may be the batch, and the sizes by votes."""
        dims: dict[Path, int] = {}
        for path, leaf in self.fields.items():
            dim, rank = self.stated.get(path, self.default), len(leaf.shape)
            if dim is None or isinstance(dim, str):
                continue
            if -rank <= dim < rank:
                dims[path] = dim % rank
            elif path in self.stated:
                raise SampleError(
                    f"batch_dims puts the batch of {dotted(path)} in dimension {dim}, but its "
                    f"shape is {tuple(leaf.shape)}"
                )
        voters = [path for path in dims if path in self.stated] or list(dims)
        return dims, Counter(fields[path].shape[dims[path]] for path in voters)

    def _voted(
        self, fields: Mapping[Path, Any], dims: Mapping[Path, int], votes: Counter[int]
    ) -> int:
        if not votes:
            raise SampleError(
                f"the sample has no tensor with a batch dimension ({shapes_of(fields)}): "
                f"{_one_batch()}"
            )
        if self.stated and len(votes) > 1 and any(path in self.stated for path in dims):
            raise SampleError(
                f"batch_dims gives different batch sizes, {sorted(votes)}: the sample's tensors "
                f"are {shapes_of(fields)}"
            )
        if any(path in self.stated for path in dims) or self.default:
            return votes.most_common(1)[0][0]
        if (counted := self._of_index(fields, votes)) is not None:
            return counted
        is_one = len(votes) > 1 and 1 in votes
        if is_one:
            votes = Counter({size: n for size, n in votes.items() if size != 1})
        (size, most), *others = votes.most_common()
        if is_one and self._may_be_one(fields, size):
            raise self._asks(f"{size} samples or 1")
        for other, number in others:
            explains_all = all(_has_at(leaf, other) for leaf in fields.values())
            if number == most or explains_all or self._looks_like_index(fields, size, other):
                raise self._asks(f"{size} samples or {other}")
        if re.search(r"class.*weight|pos_weight", " ".join(map(dotted, fields))) and not others:
            raise self._asks(f"{size} samples, or as many classes")
        return size

    def _may_be_one(self, fields: Mapping[Path, Any], size: int) -> bool:
        """Say whether a batch of 1 lies beside a list of `size` numbers, such as class weights."""
        of_size = [leaf for leaf in fields.values() if leaf.shape[0] == size]
        of_one = [leaf for leaf in fields.values() if leaf.shape[0] == 1]
        return all(leaf.ndim == 1 for leaf in of_size) and any(leaf.ndim > 1 for leaf in of_one)

    def _of_index(self, fields: Mapping[Path, Any], votes: Counter[int]) -> int | None:
        """Return the number of samples by a tensor named as the index of each row's sample."""
        for path, leaf in fields.items():
            if not is_named_index(path) or (top := _top_index(leaf)) is None:
                continue
            larger = [size for size in votes if size > top and size != leaf.shape[0]]
            if top + 1 in larger or not larger:
                return top + 1  # its last sample has rows
            if len(larger) == 1:
                return larger[0]
            raise self._asks(" or ".join(f"{size} samples" for size in sorted(larger)))
        return None

    def _looks_like_index(self, fields: Mapping[Path, Any], rows: int, size: int) -> bool:
        """Say whether rows that outnumber `size` samples may belong to them by a nameless index."""
        if size >= rows:
            return False
        tops = (_top_index(leaf) for leaf in fields.values() if leaf.shape[0] == rows)
        return any(top is not None and top == size - 1 for top in tops)

    # Flat rows

    def flat(
        self, fields: Mapping[Path, Any], size: int
    ) -> tuple[dict[str, Group], dict[Path, Role]]:
        """Return the flat rows of tensors that have an index of their sample."""
        groups: dict[str, Group] = {}
        roles: dict[Path, Role] = {}
        for path, leaf in fields.items():
            says = {dim for dim in self.stated.values() if isinstance(dim, str) and dim != "list"}
            is_named = is_named_index(path) or any(_covers(name, path) for name in says)
            if not is_named or path in self.stated or _top_index(leaf, size) is None:
                continue
            rows = int(leaf.shape[0])
            owners = torch.as_tensor(leaf).reshape(-1).cpu().long()
            is_range = torch.equal(owners, torch.arange(len(owners)))
            if rows == size and not is_range:
                continue
            groups[name := dotted(path)] = _group(owners, size)
            roles[path] = Flat(dim=0, group=name, counts="samples")
            for other, tensor in fields.items():
                if other not in roles and tensor.shape[0] == rows and rows != size:
                    roles[other] = Flat(dim=0, group=name)
            self._edges(fields, owners, name, groups, roles, size)
        return groups, roles

    def _edges(
        self,
        fields: Mapping[Path, Any],
        owners: Tensor,
        nodes: str,
        groups: dict[str, Group],
        roles: dict[Path, Role],
        size: int,
    ) -> None:
        """Give edges between flat rows to the samples of these rows."""
        for path, leaf in fields.items():
            is_edge = path and "edge_index" in path[-1] and tuple(leaf.shape[:-1]) == (2,)
            if not is_edge or path in self.stated or not leaf.shape[1]:
                continue
            ends = torch.as_tensor(leaf).cpu()
            if not _has_values(ends) or int(ends.max()) >= len(owners):
                continue
            groups[name := dotted(path)] = _group(owners[ends[0]], size)
            roles[path] = Flat(dim=1, group=name, counts=nodes)
            for other, tensor in fields.items():
                is_of_edges = other and "edge" in other[-1] and tensor.shape[0] == leaf.shape[1]
                if is_of_edges and other != path:
                    roles[other] = Flat(dim=0, group=name)

    # Words

    def _asks(self, readings: str) -> SampleError:
        known = self.fields or {(): torch.zeros(())}
        first = next(iter(known))
        return SampleError(
            f"the batch can be read in two ways, as {readings} ({shapes_of(known)}): say which "
            f"dimension is the batch, such as batch_dims={{{dotted(first)!r}: 0}}, and None for "
            "tensors that belong to no sample (with tune: Workload(model=model, "
            "batch=autobatch.batch_builder(sample, batch_dims=…)))"
        )

    def _asks_list(self, seq: _Listed) -> SampleError:
        name = dotted(seq.path)
        rows = seq.common if seq.common is not None else "the first dimension of each"
        asked = '"list"' if not seq.path else f'{{{name!r}: "list"}}'
        return SampleError(
            f"the list {name} can be read in two ways, as {seq.length} samples, or as "
            f"{seq.length} fields with {rows} rows ({shapes_of(seq.inner)}): pass "
            f"batch_dims={asked} for the first, batch_dims={0 if not seq.path else {name: 0}} for "
            "the second"
        )


def _may_be_samples(node: Any) -> bool:
    """Say whether a sequence holds only tensors, or only mappings or records with tensors."""
    if not isinstance(node, (list, tuple)) or hasattr(node, "_fields") or not node:
        return False
    if all(map(is_array, node)):
        return True
    if any(isinstance(item, (list, tuple)) or is_array(item) for item in node):
        return _are_items(node)
    if all(isinstance(item, Mapping) for item in node):
        return True
    return len(set(map(type, node))) == 1 and all(_has_arrays(item) for item in node)


def _is_texts(leaf: Any) -> bool:
    is_list = isinstance(leaf, (list, tuple)) and bool(leaf)
    return is_list and all(isinstance(item, (str, bytes)) for item in leaf)


def _are_items(node: Any) -> bool:
    """Say whether a list holds items that were not collated: tuples with a value of no rows."""
    if not isinstance(node, list) or not all(type(item) is tuple for item in node):
        return False
    return all(any(is_array(part) and not len(part.shape) for part in item) or any(
        isinstance(part, (int, float)) for part in item) for item in node)  # fmt: skip


def _has_arrays(node: Any) -> bool:
    return any(is_array(leaf) for _, leaf in leaves(node))


def _has_values(leaf: Tensor) -> bool:
    """Say whether the values of a tensor can be read: those of fake ones cannot."""
    return not leaf.is_meta and detect_fake_mode([leaf]) is None


def _top_index(leaf: Any, size: int | None = None) -> int | None:
    """Return the largest value of a tensor that can be an index of each row's sample, or None."""
    shape = tuple(leaf.shape)
    if not shape or not shape[0] or (len(shape) > 1 and shape[1:] != (1,)):
        return None
    values = torch.as_tensor(leaf)
    if not _has_values(values) or values.dtype is torch.bool or values.is_complex():
        return None
    values = values.detach().reshape(-1).cpu()
    whole = values.long()
    if not torch.equal(whole.to(values.dtype), values) or int(whole.min()) < 0:
        return None
    if not bool((whole[1:] >= whole[:-1]).all()) and size is None:
        return None
    top = int(whole.max())
    return top if size is None or top < size else None


def _group(owners: Tensor, size: int) -> Group:
    counts = torch.bincount(owners, minlength=size).tolist()
    ends = [0]
    for number in counts:
        ends.append(ends[-1] + number)
    return Group(order=torch.argsort(owners, stable=True), ends=tuple(ends))


def _has_at(leaf: Any, size: int) -> bool:
    """Say whether a batch of `size` may be in the first dimension of a tensor or in the second."""
    return size in tuple(leaf.shape[:2])


def _covers(key: str | int, path: Path) -> bool:
    """Say whether a key of `batch_dims` is a tensor's path, or its beginning or end."""
    if key == "":
        return not path
    parts = tuple(str(key).split("."))
    return path[: len(parts)] == parts or path[-len(parts) :] == parts


def _refuse_sparse(path: Path, leaf: Any) -> None:
    if isinstance(leaf, Tensor) and (leaf.layout is not torch.strided or leaf.is_nested):
        kind = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
        raise SampleError(
            f"{dotted(path)} is a {kind} tensor, which cannot be cut or repeated: pass a Workload "
            "whose batch function makes it for n samples"
        )


def _one_batch() -> str:
    """Say what is asked for where a sample has no batch dimension."""
    return for_reader(
        "pass one batch of tensors, such as sample=(inputs, labels), or a DataLoader",
        "let the batch(n) of the Workload return tensors whose first dimension is n",
    )
