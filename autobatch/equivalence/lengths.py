"""Batches in which one sample is longer than all others: a model may do something to the longest.

A model that cuts its batch to the longest sample, and then takes a mean over what is left, is exact
where all samples have the same length, and wrong in the first batch where they have not.

Invariant: the batch that was given is not changed. The masks, lengths and sequences that give the
samples the same lengths are changed together, because a model may rely on it that they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from autobatch.equivalence.numerics import Reads
from autobatch.equivalence.variations import address, arrays, copied
from autobatch.equivalence.weights import written
from autobatch.workload.sample import Rows
from autobatch.workload.tree import Path, leaves, map_leaves

__all__ = ["LengthChange", "length_changes"]

Side = Literal["right", "left"]
Lengths = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthChange:
    """A batch in which the first sample keeps its length, and all others are half as long.

    Attributes:
        where: the parts of the batch that are changed, as expressions.
        paths: of these parts.
        sides: for each side on which padding may be, what builds the batches: with other masks
            and lengths alone, and with padding in place of the data that they leave out as well.
        is_guess: whether few models take such values, so that one that fails tells nothing.
    """

    where: str
    paths: tuple[Path, ...]
    sides: tuple[tuple[Callable[[], Rows], ...], ...]
    is_guess: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A part of the batch that tells how long each sample is.

    Attributes:
        path: where it is.
        lengths: of the samples.
        write: gives the samples other lengths, in a leaf of a copy of the batch; returns the leaf.
        entries: the entries of each sample, with padding; None where there is no padding.
        side: on which the padding is; None where none shows it.
        is_guess: whether it may be something else.
    """

    path: Path
    lengths: Lengths
    write: Callable[[Any, Lengths, Side], Any]
    entries: int | None = None
    side: Side | None = None
    is_guess: bool = False


def length_changes(rows: Rows, reads: Reads) -> Iterator[LengthChange]:
    """Yield the batches with other lengths, for each group of parts that give the same lengths.

    Args:
        rows: the batch.
        reads: what the model and the loss compare tensors with, which may be padding.
    """
    groups: dict[Lengths, list[_Part]] = {}
    for part in (*_of_arrays(rows), *_of_lists(rows)):
        groups.setdefault(part.lengths, []).append(part)
    for group in groups.values():
        yield from _changes(rows, group, reads)
    for part in _of_padding(rows, reads):
        yield from _changes(rows, [part], reads, agreeing=groups.get(part.lengths, ()))


def _changes(
    rows: Rows, group: Sequence[_Part], reads: Reads, agreeing: Sequence[_Part] = ()
) -> Iterator[LengthChange]:
    """Yield the changes of a group: one for each side if its masks show where the padding is."""
    lengths = group[0].lengths
    others = tuple((min(length, lengths[0]) + 1) // 2 for length in lengths[1:])
    new = (lengths[0], *others)
    if max(others, default=lengths[0]) >= lengths[0] or new == lengths:
        return
    known: list[Side] = list(dict.fromkeys(part.side for part in group if part.side))
    is_open = any(part.entries for part in group) and not any(part.is_guess for part in group)
    unknown: tuple[Side, ...] = ("right", "left") if is_open else ("right",)
    shown: list[tuple[Side, ...]] = [(side,) for side in known]
    for sides in shown or [unknown]:
        members = [part for part in group if part.side in (None, *sides)]
        data = _data(rows, [*members, *agreeing], max(lengths))
        yield LengthChange(
            where=" and ".join(written(part.path) for part in members),
            paths=tuple(part.path for part in members),
            sides=tuple(
                (
                    partial(_changed, rows, members, new, side),
                    *(
                        [partial(_changed, rows, [*members, *agreeing], new, side, data, reads)]
                        if data or agreeing
                        else []
                    ),
                )
                for side in sides
            ),
            is_guess=any(part.is_guess for part in members),
        )


def _changed(
    rows: Rows,
    parts: Sequence[_Part],
    new: Lengths,
    side: Side,
    data: Sequence[tuple[Path, int]] = (),
    reads: Reads | None = None,
) -> Rows:
    """Return a copy of the batch with other lengths, and padding in the data that this leaves out.

    Args:
        rows: to copy.
        parts: to change.
        new: the lengths.
        side: of the padding.
        data: tensors that get padding, with the dimension of their entries.
        reads: what tensors are compared with, which may be their padding.
    """
    writes = {part.path: part.write for part in parts}

    def visit(path: Path, leaf: Any) -> Any:
        return writes[path](leaf, new, side) if path in writes else leaf

    changed = map_leaves(visit, copied(rows.batch), stop=rows.layout.stop)
    found, given = arrays(changed), arrays(rows.batch)
    for path, dim in data:
        constants = reads.compared.get(address(given[path]), set()) if reads is not None else set()
        padding = next((c for c in sorted(constants) if _fits(c, given[path])), 0)
        entries = _by_sample(rows, path, found[path]).movedim(dim, 1)
        _fill(entries, new, side, torch.tensor(padding).to(entries.dtype))
    return replace(rows, batch=changed)


def _fill(entries: Tensor, lengths: Lengths, side: Side, padding: Tensor | float) -> None:
    """Write padding into all entries of each sample but its own."""
    size = entries.shape[1]
    for row, length in zip(entries, lengths, strict=True):
        start, stop = (length, size) if side == "right" else (0, size - length)
        row[start:stop] = padding


def _by_sample(rows: Rows, path: Path, tensor: Tensor) -> Tensor:
    """Return a view of a tensor that has samples, with these in its first dimension."""
    dim = rows.layout.roles[path]
    assert isinstance(dim, int)
    return tensor.movedim(dim, 0)


def _of_rows(rows: Rows) -> Iterator[tuple[Path, Tensor]]:
    """Yield the tensors and arrays of real numbers that have one row for each sample."""
    for path, tensor in arrays(rows.batch).items():
        has_rows = isinstance(rows.layout.roles.get(path), int) and tensor.numel() > 0
        if has_rows and not tensor.is_complex():
            yield path, _by_sample(rows, path, tensor)


def _data(rows: Rows, parts: Sequence[_Part], longest: int) -> list[tuple[Path, int]]:
    """Return the tensors whose entries the parts are about, with the dimension of the entries."""
    changed = {part.path for part in parts}
    entries = next((part.entries for part in parts if part.entries), None)
    found = []
    for path, tensor in _of_rows(rows):
        sizes = tensor.shape[1:]
        dim = next((d for d, n in enumerate(sizes, 1) if n == (entries or max(n, longest))), None)
        if path not in changed and dim is not None:
            found.append((path, dim))
    return found


def _of_arrays(rows: Rows) -> Iterator[_Part]:
    """Yield lengths and masks among the tensors and arrays."""
    for path, tensor in _of_rows(rows):
        flat = tensor.reshape(len(tensor), -1)
        is_integer = not (tensor.is_floating_point() or tensor.dtype == torch.bool)
        if flat.shape[1] == 1:
            if is_integer and bool((flat >= 0).all()):
                lengths = tuple(map(int, flat[:, 0].tolist()))
                yield _Part(path=path, lengths=lengths, write=partial(_write_numbers, rows, path))
        elif flat.shape[1] == max(tensor.shape[1:]):
            yield from _masks(rows, path, flat)


def _write_numbers(rows: Rows, path: Path, leaf: Any, lengths: Lengths, _: Side) -> Any:
    numbers = _by_sample(rows, path, torch.as_tensor(leaf))
    for row, length in zip(numbers, lengths, strict=True):
        row.fill_(length)
    return leaf


def _masks(rows: Rows, path: Path, flat: Tensor) -> Iterator[_Part]:
    """Yield what a mask of padding may say: whether ones or zeros are padding is not known."""
    if not bool(((flat == 0) | (flat == 1)).all()):
        return
    ones, size = flat != 0, flat.shape[1]
    for own in (1, 0):
        is_own = ones if own else ~ones
        counts = is_own.sum(1)
        places = torch.arange(size)[None]
        lengths = tuple(map(int, counts.tolist()))
        part = _Part(
            path=path,
            lengths=lengths,
            write=partial(_write_mask, rows, path, own),
            entries=size,
        )
        if bool(is_own.all()):
            yield part
        elif bool((counts == 0).all()):
            continue
        elif torch.equal(is_own, places < counts[:, None]):
            yield replace(part, side="right")
        elif torch.equal(is_own, places >= size - counts[:, None]):
            yield replace(part, side="left")


def _write_mask(rows: Rows, path: Path, own: int, leaf: Any, lengths: Lengths, side: Side) -> Any:
    mask = _by_sample(rows, path, torch.as_tensor(leaf))
    dim = max(range(1, mask.dim()), key=lambda d: mask.shape[d])
    mask.fill_(own)
    _fill(mask.movedim(dim, 1), lengths, side, 1 - own)
    return leaf


def _of_lists(rows: Rows) -> Iterator[_Part]:
    """Yield lists of lengths, of texts and of sequences, with one item for each sample."""
    for path, leaf in leaves(rows.batch, stop=rows.layout.stop):
        if not isinstance(leaf, (list, tuple)) or len(leaf) != rows.size:
            continue
        if all(type(item) is int and item >= 0 for item in leaf):
            yield _Part(path=path, lengths=tuple(leaf), write=_write_items)
        elif all(isinstance(item, (str, bytes)) or _is_sequence(item) for item in leaf):
            lengths = tuple(map(len, leaf))
            yield _Part(path=path, lengths=lengths, write=_cut_items, is_guess=True)


def _is_sequence(item: Any) -> bool:
    """Say whether an item is a row of numbers or of vectors; images and boxes are not cut."""
    return isinstance(item, Tensor) and item.dim() in (1, 2)


def _write_items(leaf: Any, lengths: Lengths, _: Side) -> Any:
    return type(leaf)(lengths)


def _cut_items(leaf: Any, lengths: Lengths, _: Side) -> Any:
    return type(leaf)([item[:length] for item, length in zip(leaf, lengths, strict=True)])


def _of_padding(rows: Rows, reads: Reads) -> Iterator[_Part]:
    """Yield tensors that are compared with a number: where their rows end with it is padding."""
    for path, tensor in _of_rows(rows):
        if tensor.dim() < 2 or tensor.shape[1] < 2 or tensor.dtype == torch.bool:
            continue
        for number in sorted(reads.compared.get(address(tensor), ())):
            if not _fits(number, tensor):
                continue
            is_own = (tensor != number).flatten(2).any(2) if tensor.dim() > 2 else tensor != number
            ends = is_own * torch.arange(1, tensor.shape[1] + 1)
            yield _Part(
                path=path,
                lengths=tuple(map(int, ends.amax(1).tolist())),
                write=partial(_write_padding, rows, path, number),
                entries=tensor.shape[1],
                is_guess=True,
            )


def _write_padding(
    rows: Rows, path: Path, number: float, leaf: Any, lengths: Lengths, side: Side
) -> Any:
    _fill(_by_sample(rows, path, torch.as_tensor(leaf)), lengths, side, number)
    return leaf


def _fits(number: float, tensor: Tensor) -> bool:
    """Say whether a tensor can hold a number."""
    if tensor.is_floating_point():
        return True
    if tensor.dtype == torch.bool or number != int(number):
        return False
    limits = torch.iinfo(tensor.dtype)
    return limits.min <= number <= limits.max
