"""Finds out which part of every leaf of a batch belongs to which sample.

Invariant: this module alone decides it, by `listed` of lists and by `flat_rows` of rows with an
index. Where a batch can be read in two ways it is an error that shows both, never the first.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autobatch.errors import SampleError
from autobatch.support.wording import for_reader
from autobatch.workload.batch_objects import BatchObject, batch_object
from autobatch.workload.flat_rows import flat_rows, may_be_indexed, sizes_by_index
from autobatch.workload.layout import (
    HANDFUL,
    BatchDims,
    Flat,
    Group,
    Layout,
    Role,
    covers,
    dotted,
    refuse_packed,
    shapes_of,
)
from autobatch.workload.listed import Answer, Case, Listed, has_samples
from autobatch.workload.sequences import is_sequence, sequences_of
from autobatch.workload.tree import Path, is_array, leaves

__all__ = ["compared", "layout_of"]


def layout_of(batch: Any, batch_dims: BatchDims = None, like: Layout | None = None) -> Layout:
    """Find the samples of a batch; lists as in a batch before it, whose layout is `like`.

    Raises:
        SampleError: there are none, or they can be read in two ways.
    """
    return _Reading(batch, batch_dims, like).layout()


def compared(one: Any, samples: int, other: Any, others: int) -> Layout | None:
    """Find the samples by two batches of different sizes, made by one function.

    A dimension that grows with the samples is theirs, whatever its size; one that grows by several
    rows a sample has flat rows.

    Returns:
        None where what differs between them is not explained by the number of samples.

    Raises:
        SampleError: one of its tensors is packed.
    """
    if batch_object(one) is not None:
        return None
    lists = frozenset(path for path, a, b in _sequences(one, other) if len(a) != len(b))

    def stop(path: Path, node: Any) -> bool:
        refuse_packed(node)
        return path in lists

    left, right = dict(leaves(one, stop=stop)), dict(leaves(other, stop=stop))
    if left.keys() != right.keys():
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
    same = sequences_of(one, samples, stop=stop)
    known_groups, known = flat_rows(arrays, samples, {})
    return Layout(
        size=samples,
        roles=roles | known,
        lists=lists,
        sequences=dict.fromkeys(same, False),
        groups=groups | known_groups,
        rest=frozenset(path for path, leaf in arrays.items() if path not in roles and leaf.shape),
    )


def _sequences(one: Any, other: Any) -> Iterator[tuple[Path, Any, Any]]:
    """Yield the lists, tuples and other sequences that two batches have in the same places."""

    def found_in(batch: Any) -> dict[Path, Any]:
        found: dict[Path, Any] = {}

        def note(path: Path, node: Any) -> bool:
            is_end = is_sequence(node)
            if is_end or isinstance(node, (list, tuple)):
                found[path] = node
            return is_end

        list(leaves(batch, stop=note))
        return found

    twins = found_in(other)
    for path, node in found_in(one).items():
        if path in twins:
            yield path, node, twins[path]


class _Reading:
    """One batch, while it is found out what it is made of."""

    def __init__(self, batch: Any, batch_dims: BatchDims, like: Layout | None) -> None:
        self.batch = batch
        self.like = like
        self.stated: dict[Path, int | str | None] = {}
        self.default = batch_dims if isinstance(batch_dims, int) else 0
        self.is_of_fields = isinstance(batch_dims, int)
        self.objects: dict[Path, BatchObject] = {}
        self.candidates: list[Listed] = []
        self.sequences: dict[Path, Any] = {}
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
            if Listed.may_be(node):
                for inner, leaf in leaves(node):
                    if isinstance(leaf, Tensor) and leaf.is_nested:
                        _refuse_sparse((*path, *inner), leaf)
                self.candidates.append(Listed(path, node))
                return True
            return isinstance(node, deque) and is_sequence(node)

        for path, leaf in leaves(self.batch, stop=look):
            if is_array(leaf):
                _refuse_sparse(path, leaf)  # nested ones have no shape to look at
                self.fields[path] = leaf
            elif is_sequence(leaf):
                self.sequences[path] = leaf

    def _state(self, batch_dims: BatchDims) -> None:
        given: Mapping[Any, Any] = batch_dims if isinstance(batch_dims, Mapping) else {}
        if isinstance(batch_dims, str):
            given = {"": batch_dims}
        known = {**self.fields, **{c.path: c.node for c in self.candidates}}
        for candidate in self.candidates:  # by name, for those that are fields after all
            known |= {(*candidate.path, *path): leaf for path, leaf in candidate.inner.items()}
        for key, dim in given.items():
            covered = [path for path in known if covers(key, path)]
            # a name that tensors have too is theirs; one of its own is a sequence's
            covered += [
                path
                for path in self.sequences
                if dotted(path) == str(key) or (not covered and covers(key, path))
            ]
            if not covered:
                raise SampleError(
                    f"batch_dims names {key!r}, but the sample's tensors are "
                    f"{shapes_of({p: leaf for p, leaf in known.items() if is_array(leaf)})}"
                )
            for path in covered:
                self.stated.setdefault(path, dim)

    def layout(self) -> Layout:
        for candidate in self.candidates:
            if has_samples(self._case(candidate)):
                self.lists.add(candidate.path)
            else:
                self.fields |= {
                    (*candidate.path, *path): leaf for path, leaf in candidate.inner.items()
                }
        fields = {path: leaf for path, leaf in self.fields.items() if len(leaf.shape)}
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
        whole = frozenset(
            path for path, dim in self.stated.items() if dim is None and path not in self.sequences
        )
        groups, roles = flat_rows(fields, size, self.stated)
        for path, dim in dims.items():
            if path not in roles and fields[path].shape[dim] == size:
                roles[path] = dim
        return Layout(
            size=size,
            roles=roles,
            lists=frozenset(self.lists),
            sequences=sequences_of(
                self.batch, size, stop=self._is_known, stated=self.stated, like=self.like
            ),
            objects=frozenset(self.objects),
            groups=groups,
            whole=whole,
            rest=frozenset(fields.keys() - roles.keys() - whole),
        )

    def _is_known(self, path: Path, _node: Any) -> bool:
        return path in self.lists or path in self.objects

    def _case(self, seq: Listed) -> Case:
        """Return a list with what else the batch has, by the lists that were looked at before."""
        lengths = {c.length for c in self.candidates if c is not seq}
        short: set[int] = set()
        for values in self.sequences.values():
            is_long = len(values) > HANDFUL or _is_texts(values)
            (lengths if is_long else short).add(len(values))
        return Case(
            seq=seq,
            stated=self._stated(seq),
            fields={path: leaf for path, leaf in self.fields.items() if len(leaf.shape)},
            lengths=lengths,
            short=short,
        )

    def _stated(self, seq: Listed) -> Answer | None:
        """Return what `batch_dims` makes of a list; None where it does not say."""
        if self.stated.get(seq.path) == "list":
            return "samples"
        paths = (seq.path, *((*seq.path, *path) for path in seq.inner))
        is_of_fields = self.is_of_fields and not seq.path
        if is_of_fields or any(path in self.stated for path in paths):
            return "fields"
        # As in a batch before: a last one of few samples tells less.
        return "samples" if self.like is not None and seq.path in self.like.lists else None

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
        sizes = sizes_by_index(fields, votes)
        if len(sizes) > 1:
            raise self._asks(" or ".join(f"{size} samples" for size in sizes))
        if sizes:
            return sizes[0]
        is_one = len(votes) > 1 and 1 in votes
        if is_one:
            votes = Counter({size: n for size, n in votes.items() if size != 1})
        (size, most), *others = votes.most_common()
        if is_one and self._may_be_one(fields, size):
            raise self._asks(f"{size} samples or 1")
        for other, number in others:
            explains_all = all(_has_at(leaf, other) for leaf in fields.values())
            if number == most or explains_all or may_be_indexed(fields, size, other):
                raise self._asks(f"{size} samples or {other}")
        if re.search(r"class.*weight|pos_weight", " ".join(map(dotted, fields))) and not others:
            raise self._asks(f"{size} samples, or as many classes")
        return size

    def _may_be_one(self, fields: Mapping[Path, Any], size: int) -> bool:
        """Say whether a batch of 1 lies beside a list of `size` numbers, such as class weights."""
        of_size = [leaf for leaf in fields.values() if leaf.shape[0] == size]
        of_one = [leaf for leaf in fields.values() if leaf.shape[0] == 1]
        return all(leaf.ndim == 1 for leaf in of_size) and any(leaf.ndim > 1 for leaf in of_one)

    def _asks(self, readings: str) -> SampleError:
        known = self.fields or {(): torch.zeros(())}
        first = next(iter(known))
        return SampleError(
            f"the batch can be read in two ways, as {readings} ({shapes_of(known)}): say which "
            f"dimension is the batch, such as batch_dims={{{dotted(first)!r}: 0}}, and None for "
            "tensors that belong to no sample (with tune: Workload(model=model, "
            "batch=autobatch.batch_builder(sample, batch_dims=…)))"
        )


def _is_texts(leaf: Any) -> bool:
    is_list = isinstance(leaf, (list, tuple)) and bool(leaf)
    return is_list and all(isinstance(item, (str, bytes)) for item in leaf)


def _has_at(leaf: Any, size: int) -> bool:
    """Say whether a batch of `size` may be in the first dimension of a tensor or in the second."""
    return size in tuple(leaf.shape[:2])


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
