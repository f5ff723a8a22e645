"""Batches of any size from one sample.

Invariant: a builder reads no values and uses plain torch operations only, so it behaves the same
on real tensors and inside a `FakeTensorMode`, where a billion rows cost nothing; every batch
keeps the sample's structure, dtypes, range of values and memory format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autobatch.errors import SampleError
from autobatch.support.torch_private import detect_fake_mode
from autobatch.support.wording import count, listed
from autobatch.workload.batch_objects import batch_object
from autobatch.workload.dataset import Drawn, draw
from autobatch.workload.layout import (
    BatchDims,
    Flat,
    Group,
    Layout,
    dotted,
    named_tensors,
)
from autobatch.workload.layout_reading import compared, layout_of
from autobatch.workload.sequences import refuse_doubt, repeated, some_of
from autobatch.workload.tree import Path, is_array, leaves, map_leaves, map_tensors

__all__ = ["BatchDims", "Built", "Rows", "batch_builder", "built", "named_tensors", "rows_of"]

NAMES_SHOWN = 4


def batch_builder(sample: Any, *, batch_dims: BatchDims = None) -> Callable[[int], Any]:
    """Return a function that builds a batch of any number of samples by repeating rows.

    The batch size of the sample is the first dimension that its tensors share, or the length of
    its lists of images and targets. Tensors with that first dimension are resized, lists of that
    length are repeated, and flat rows follow the index of their sample (`batch_idx` of boxes,
    `batch` of graphs' nodes). Of a data set, n is learned from its own collate function. What
    belongs to no sample is kept; if that is most of the bytes, or if the batch can be read in two
    ways, it is an error that asks for `batch_dims`.

    Args:
        sample: one batch (a tensor or any nesting of dicts, sequences, dataclasses, registered
            pytree nodes and plain objects that hold tensors), or a `Dataset` or `DataLoader`, of
            which the largest items are collated (all items are looked at, if that takes seconds
            only). A loader's workers are not started, and the random state is as before.
        batch_dims: where the batch dimension is not the first: one dimension for all tensors, or
            a mapping from a tensor's dotted path, or the beginning or end of that ("inputs.src",
            0, "src"), to its batch dimension; `None` keeps that tensor as it is, and "list" says of
            a list that its entries are the samples.

    Returns:
        `build(n)`: the sample's structure with contiguous CPU tensors of n rows (channels-last
        where the sample's were), each a fresh leaf that requires grad where the sample's did.

    Raises:
        SampleError: no tensor has a batch dimension, or it can be read in two ways, the batch is
            empty, `batch_dims` does not match, an item of the data set cannot be read, or its items
            cannot be collated.

    >>> build = batch_builder({"x": torch.tensor([[1, 2], [3, 4]]), "scale": 0.5})
    >>> build(3)
    {'x': tensor([[1, 2],
            [3, 4],
            [1, 2]]), 'scale': 0.5}
    """
    return built(draw(sample), batch_dims)


@dataclass(frozen=True, slots=True)
class Built:
    """Makes batches of any number of samples from the rows of one.

    Attributes:
        rows: the one batch.
        notes: what of it is the same in every batch, in one sentence.
        rivals: makers of batches of the same data set that may take more memory.
        batch_dims: where the batch dimension was said to be.
    """

    rows: Rows
    notes: tuple[str, ...] = ()
    rivals: tuple[Built, ...] = ()
    batch_dims: BatchDims = None

    def __call__(self, n: int) -> Any:
        """Return a batch of n samples."""
        rows, layout = self.rows, self.rows.layout

        def resize(path: Path, leaf: Any) -> Any:
            if path in layout.objects:
                return _joined(leaf, n)
            if path in layout.lists or layout.sequences.get(path):
                return repeated(leaf, [row % layout.size for row in range(n)], _fresh)
            role = layout.roles.get(path)
            if not is_array(leaf):
                return leaf
            if isinstance(role, Flat):
                return _flat_rows(leaf, role, layout, n)
            return _resized(leaf, role, n)

        return map_leaves(resize, rows.batch, stop=layout.stop)


def built(drawn: Drawn, batch_dims: BatchDims = None) -> Built:
    """Return what makes batches like a drawn one, as `batch_builder` describes it.

    Where a collate function made it, batches of two sizes show what belongs to a sample.

    Raises:
        SampleError: as in `batch_builder`.
    """
    batch = map_tensors(_on_cpu, drawn.batch)
    layout = None
    if batch_dims is None and drawn.other is not None:
        layout = compared(batch, drawn.samples, *drawn.other)
    if layout is None:
        layout = layout_of(batch, batch_dims)
    for path, leaf in leaves(batch, stop=layout.stop):
        if layout.sequences.get(path, False) is None:
            refuse_doubt(path, leaf, layout.size)
    return Built(
        Rows(batch, layout),
        (*drawn.notes, *_flat_named(layout), *_unscaled(batch, layout)),
        tuple(built(rival, batch_dims) for rival in drawn.rivals),
        batch_dims,
    )


def _flat_named(layout: Layout) -> tuple[str, ...]:
    """Say which tensors were taken for flat rows of the samples of which others."""
    flat = [dotted(path) for path, role in layout.roles.items() if isinstance(role, Flat)]
    if not flat:
        return ()
    others = [dotted(path) for path in layout.roles if dotted(path) not in flat]
    others += map(dotted, sorted(layout.lists))
    of = f" of {listed(others, NAMES_SHOWN)}" if others else ""
    return (
        f"the sample was read as {count(layout.size, 'sample')}{of}, with "
        f"{listed(flat, NAMES_SHOWN)} as flat rows of all of them; pass batch_dims= if that is "
        "wrong",
    )


def _unscaled(batch: Any, layout: Layout) -> tuple[str, ...]:
    """Name what belongs to no sample.

    Raises:
        SampleError: it is most of the bytes.
    """
    sizes = {path: (leaf.shape, _nbytes(leaf)) for path, leaf in leaves(batch, stop=layout.stop)
             if path in layout.rest}  # fmt: skip
    if not sizes:
        return ()
    shown = listed([f"{dotted(path)} {tuple(shape)}" for path, (shape, _) in sizes.items()],
                   NAMES_SHOWN)  # fmt: skip
    held = [node for path, node in leaves(batch, stop=layout.stop) if path not in layout.rest]
    scaled = sum(_nbytes(leaf) for node in held for _, leaf in leaves(node) if is_array(leaf))
    # a leading dimension of 1 is made to be the same for all samples
    unknown = sum(size for shape, size in sizes.values() if shape[0] != 1)
    if unknown > scaled and not layout.objects:
        name = dotted(next(path for path, (shape, _) in sizes.items() if shape[0] != 1))
        raise SampleError(
            f"the sample was read as {count(layout.size, 'sample')}, and most of its bytes belong "
            f"to none of them ({shown}): say which dimension is the batch, such as "
            f"batch_dims={{{name!r}: 1}}, or None if every batch has all of it"
        )
    return (
        f"{shown} of the sample is the same in every batch, whatever its size: it has no dimension "
        f"of {count(layout.size, 'sample')}; pass batch_dims= if that is wrong",
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch whose samples can be counted and cut.

    Attributes:
        batch: the batch as it was given.
        layout: where its samples are.
    """

    batch: Any
    layout: Layout

    @property
    def size(self) -> int:
        """Its number of samples."""
        return self.layout.size

    @property
    def dims(self) -> dict[Path, int]:
        """The batch dimension of each tensor that has one, by path."""
        return {path: role for path, role in self.layout.roles.items() if isinstance(role, int)}

    def cut(self, start: int, stop: int) -> Any:
        """Return samples `start` to `stop` in the batch's own structure; tensors are views.

        Flat rows whose samples do not follow one another are copied.

        Raises:
            SampleError: a tensor does not have one row for each sample, so it is unknown which
                part of it belongs to these samples; or it is sparse.
        """
        layout = self.layout

        def visit(path: Path, leaf: Any) -> Any:
            if path in layout.objects:
                return _taken(leaf, range(start, stop))
            has_one_each = path in layout.lists or layout.sequences.get(path, False)
            if has_one_each:
                return some_of(leaf, start, stop)
            if has_one_each is None and stop - start < layout.size:
                refuse_doubt(path, leaf, layout.size)
            if not is_array(leaf):
                return leaf
            role = layout.roles.get(path)
            if role is not None:
                _refuse_sparse(path, leaf, layout.size)
            if isinstance(role, Flat):
                return _cut_rows(leaf, role, layout, start, stop)
            if role is not None:
                return _narrowed(leaf, role, start, stop)
            if path in layout.rest and leaf.shape[0] != 1:
                raise SampleError(
                    f"a batch of {layout.size} samples has to be cut, but {dotted(path)} has "
                    f"the shape {tuple(leaf.shape)}: let the loader yield micro-batches, or "
                    f"pass batch_dims={{{dotted(path)!r}: None}} if each needs all of it"
                )
            return leaf

        return map_leaves(visit, self.batch, stop=layout.stop)

    def first(self, samples: int) -> Rows:
        """Return the first samples, to be cut further."""
        return Rows(self.cut(0, samples), self.layout.first(samples))


def rows_of(batch: Any, *, batch_dims: BatchDims = None, like: Layout | None = None) -> Rows:
    """Count the samples of a batch, by the rules of `batch_builder`.

    Args:
        batch: the batch.
        batch_dims: where its samples are, as in `batch_builder`.
        like: the layout of a batch before it, as which lists are read where their rules ask.

    Raises:
        SampleError: no tensor has a batch dimension, the batch is empty, it can be read in two
            ways, or `batch_dims` does not match.

    >>> rows = rows_of({"x": torch.tensor([[1, 2], [3, 4], [5, 6]]), "id": ["a", "b", "c"]})
    >>> rows.size, rows.cut(1, 3)
    (3, {'x': tensor([[3, 4],
            [5, 6]]), 'id': ['b', 'c']})
    """
    return Rows(batch, layout_of(batch, batch_dims, like))


def _nbytes(leaf: Any) -> int:
    if isinstance(leaf, Tensor):
        return leaf.numel() * leaf.element_size()
    return int(leaf.nbytes) if is_array(leaf) else 0


def _refuse_sparse(path: Path, leaf: Any, size: int) -> None:
    """Refuse to cut a tensor whose rows are not in one piece of memory, which has no views."""
    if isinstance(leaf, Tensor) and leaf.layout is not torch.strided:
        kind = str(leaf.layout).removeprefix("torch.")
        raise SampleError(
            f"a batch of {count(size, 'sample')} has to be cut, but {dotted(path)} is a {kind} "
            "tensor, which cannot be: let the loader yield micro-batches, or make it dense"
        )


def _narrowed(leaf: Any, dim: int, start: int, stop: int) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.narrow(dim, start, stop - start)
    return leaf[(slice(None),) * dim + (slice(start, stop),)]


# Flat rows


def _rows_until(group: Group, n: int, size: int) -> int:
    """Return how many rows the first n samples have, where `size` samples are repeated."""
    return n // size * group.rows + group.ends[n % size]


def _flat_rows(leaf: Any, role: Flat, layout: Layout, n: int) -> Any:
    group, size = layout.groups[role.group], layout.size
    mode = detect_fake_mode()
    given = leaf if isinstance(leaf, Tensor) else torch.as_tensor(leaf)
    source = (mode.from_tensor(given) if mode and given is leaf else given).detach()
    total = _rows_until(group, n, size)
    places = torch.arange(total) % max(group.rows, 1)
    order = mode.from_tensor(group.order) if mode else group.order
    rows = source.index_select(role.dim, order[places])
    cycle = (torch.arange(total) // max(group.rows, 1)).to(rows.dtype)
    if role.counts == "samples":
        rows = rows + (cycle * size).reshape(-1, *[1] * (rows.dim() - 1))
    elif role.counts is not None:
        pointed = layout.groups[role.counts]
        known = mode.from_tensor(pointed.places) if mode else pointed.places
        rows = known[rows].to(rows.dtype) + cycle * pointed.rows
    return _like(leaf, rows.contiguous())


def _cut_rows(leaf: Any, role: Flat, layout: Layout, start: int, stop: int) -> Any:
    group = layout.groups[role.group]
    first, last = group.ends[start], group.ends[stop]
    in_order = torch.equal(group.order, torch.arange(group.rows))
    tensor = torch.as_tensor(leaf)
    if in_order:
        rows = tensor.narrow(role.dim, first, last - first)
    else:
        rows = tensor.index_select(role.dim, group.order[first:last].to(tensor.device))
    if role.counts == "samples":
        rows = rows - start
    elif role.counts is not None:
        pointed = layout.groups[role.counts]
        rows = pointed.places.to(rows.device)[rows].to(rows.dtype) - pointed.ends[start]
    return _like(leaf, rows)


def _like(leaf: Any, rows: Tensor) -> Any:
    """Return rows as what they were taken from: a tensor, or an array."""
    if not isinstance(leaf, Tensor):
        return rows.numpy() if detect_fake_mode() is None else rows
    return rows.requires_grad_(leaf.requires_grad) if rows.is_leaf else rows


# Rows that are repeated


def _taken(node: Any, rows: Sequence[int]) -> Any:
    found = batch_object(node)
    assert found is not None
    return found.take(rows)


def _joined(node: Any, n: int) -> Any:
    mode = detect_fake_mode()
    source = map_tensors(mode.from_tensor, node) if mode else node
    found = batch_object(source)
    assert found is not None
    return found.take([row % found.size for row in range(n)])


def _fresh(item: Any) -> Any:
    """Copy a sample with its tensors; rows share objects of other kinds."""
    return map_tensors(lambda leaf: _resized(leaf, None, 1), item)


def _on_cpu(leaf: Tensor) -> Tensor:
    """Bring a tensor to the CPU; one on `meta` has no values, so zeros stand in for them."""
    if leaf.is_meta:
        values = torch.zeros((), dtype=leaf.dtype, device="cpu").expand(leaf.shape)
    else:
        values = leaf.detach().cpu()
    return values.requires_grad_(leaf.requires_grad)


def _resized(leaf: Any, dim: int | None, n: int) -> Any:
    """Return fresh rows, n along `dim`, or a copy where there is no such dimension."""
    mode = detect_fake_mode()
    if not isinstance(leaf, Tensor):
        if dim is None:
            return leaf.copy()
        if mode is None:
            return leaf.take([row % leaf.shape[dim] for row in range(n)], axis=dim)
        rows = torch.as_tensor(leaf)  # nothing but a tensor can be fake
        return _resized(rows, dim, n)
    source = (mode.from_tensor(leaf) if mode else leaf).detach()
    if dim is None:
        rows = source.clone()
    else:
        index = torch.arange(n, device=leaf.device) % leaf.shape[dim]
        rows = source.index_select(dim, index).contiguous(memory_format=_memory_format(leaf))
    return rows.requires_grad_(leaf.requires_grad)


def _memory_format(leaf: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(leaf.dim(), torch.contiguous_format)
    plain = leaf.is_contiguous() or not leaf.is_contiguous(memory_format=last)
    return torch.contiguous_format if plain else last
