"""What a sample leaves open: the batch with one mask, length, label or list changed in one sample.

A loss that divides by a count is exact where all samples have the same count, and wrong in the
first batch where they have not. Each variation makes one count unequal.

Invariant: the batch that was given is not changed, and a variation changes its first sample alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autobatch.equivalence.numerics import Reads
from autobatch.equivalence.weights import written
from autobatch.workload.layout import Flat, Group
from autobatch.workload.sample import Rows
from autobatch.workload.tree import Path, is_array, leaves, map_leaves, map_tensors, tensors

__all__ = ["Variation", "address", "arrays", "copied", "variations"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variation:
    """A batch in which one sample has another count than the others.

    Attributes:
        where: the part of the batch that is changed, as an expression.
        what: what the part holds now, in words that follow "where".
        is_usual: whether batches of this kind of data have such values without being asked to; an
            ignored label is none where each sample has one label only.
        is_guess: whether few losses take such values, so that one that fails tells nothing.
        rows: the batch.
    """

    where: str
    what: str
    is_usual: bool
    rows: Rows
    is_guess: bool = False


def variations(rows: Rows, reads: Reads) -> Iterator[Variation]:
    """Yield the variations of a batch in what the loss reads.

    Args:
        rows: the batch.
        reads: the tensors that the loss computes with, and what it compares them with; all
            tensors are changed if it knows none.
    """
    layout = rows.layout
    for path, tensor in arrays(rows.batch).items():
        role = layout.roles.get(path)
        of_list = next((known for known in layout.lists if path[: len(known)] == known), None)
        if of_list is not None:
            if path[len(of_list)] == "0":
                yield from _changed_values(rows, path, None, reads.constants)
        elif isinstance(role, Flat):
            if role.counts == "samples":
                yield from _moved_row(rows, path, tensor, role)
        elif role is not None and (not reads.storages or address(tensor) in reads.storages):
            yield from _changed_values(rows, path, role, reads.constants)
    for path, leaf in leaves(rows.batch, stop=layout.stop):
        if isinstance(leaf, (list, tuple)) and len(leaf) == rows.size:
            yield from _other_items(rows, path, leaf)


def arrays(batch: Any) -> dict[Path, Tensor]:
    """Return all tensors by path, and arrays as tensors that share their memory."""
    found = {path: leaf for path, leaf in leaves(batch) if is_array(leaf)}
    return {
        path: torch.as_tensor(leaf)
        for path, leaf in found.items()
        if isinstance(leaf, Tensor) or leaf.dtype.kind in "biufc"  # neither objects nor texts
    }


def copied(batch: Any) -> Any:
    """Return a copy of a batch and of its tensors and arrays."""

    def copy(_: Path, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        return leaf.copy() if is_array(leaf) else leaf

    return map_leaves(copy, batch)


def address(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, by which `Reads` knows it."""
    return tensor.untyped_storage().data_ptr()


def _changed_values(
    rows: Rows, path: Path, dim: int | None, constants: Collection[float]
) -> Iterator[Variation]:
    part = _half_of_first(arrays(rows.batch)[path], dim)
    where = "half of one sample's" if part.dim() else "one sample's"
    for value, what in _values(part, constants):
        new = torch.as_tensor(value).to(part.dtype)
        if torch.equal(new.expand(part.shape), part):
            continue
        changed = copied(rows.batch)
        _half_of_first(arrays(changed)[path], dim).copy_(new)
        is_label = not (part.is_floating_point() or part.dtype == torch.bool)
        is_usual = part.dim() > 0 or not is_label or not bool(new.lt(0).any())
        yield Variation(
            where=written(path),
            what=f"with {where} {what}",
            is_usual=is_usual,
            is_guess=bool(new.isnan().any()),
            rows=replace(rows, batch=changed),
        )


def _half_of_first(tensor: Tensor, dim: int | None) -> Tensor:
    """Return a view of the second half of the first sample's entries; of all if it has one.

    The tensor is the first sample's alone if it has no dimension of samples.
    """
    first = tensor if dim is None else tensor.select(dim, 0)
    if not first.dim():
        return first
    half = first.shape[-1] // 2
    return first.narrow(-1, half, first.shape[-1] - half)


def _values(part: Tensor, constants: Collection[float]) -> Iterator[tuple[Any, str]]:
    """Yield other values for a part of a tensor, the likeliest to be ignored first."""
    if part.dtype == torch.bool:
        yield ~part, "reversed"
    elif part.is_floating_point():
        # Most losses give NaN for NaN, which is no finding; one that does not has a mask.
        for value in dict.fromkeys([0.0, *(c for c in constants if c == c), math.nan]):
            yield value, f"at {value:g}"
        yield part * 0.5 + 0.1, "at other values"
    elif not part.is_complex():
        # Negative numbers where the loss asks for them alone: as lengths they crash some kernels.
        limits = torch.iinfo(part.dtype)
        whole = sorted(int(c) for c in constants if math.isfinite(c) and c == int(c))
        for value in dict.fromkeys([*whole, 0, 1, *([2] if part.dim() else [])]):
            if limits.min <= value <= limits.max:
                yield value, f"at {value}"
        if not part.dim():
            yield part // 2, "at half"


def _moved_row(rows: Rows, path: Path, tensor: Tensor, role: Flat) -> Iterator[Variation]:
    """Give one of the first sample's flat rows to the last sample."""
    owners = tensor.reshape(-1)
    own = (owners == 0).nonzero().flatten()
    layout = rows.layout
    if len(own) < 2 or any(g.rows != len(owners) for g in layout.groups.values()):
        return
    changed = copied(rows.batch)
    moved = arrays(changed)[path].view(-1)
    moved[own[-1]] = rows.size - 1
    moved = moved.long()
    counts = torch.bincount(moved, minlength=rows.size).cumsum(0).tolist()
    group = Group(order=torch.argsort(moved, stable=True), ends=(0, *counts))
    groups: Mapping[str, Group] = {**layout.groups, role.group: group}
    yield Variation(
        where=written(path),
        what="with a row of one sample given to another",
        is_usual=True,
        rows=Rows(changed, replace(layout, groups=groups)),
    )


def _other_items(rows: Rows, path: Path, items: Any) -> Iterator[Variation]:
    """Change the first item of a list of samples: a number, a text, or the rows of its tensors."""
    for other, what, is_usual, is_guess in _others(items[0]):

        def visit(at: Path, leaf: Any, other: Any = other) -> Any:
            return type(leaf)([other, *leaf[1:]]) if at == path else leaf

        yield Variation(
            where=written(path),
            what=what,
            is_usual=is_usual,
            is_guess=is_guess,
            rows=replace(rows, batch=map_leaves(visit, rows.batch, stop=rows.layout.stop)),
        )


def _others(item: Any) -> Iterator[tuple[Any, str, bool, bool]]:
    """Yield other items, what they are, whether they are usual and whether they are guesses.

    A single row is doubled, because no rows at all are a case of their own.
    """
    shorter = "with another length of one sample"
    if isinstance(item, bool):
        yield not item, "with one sample's reversed", True, False
    elif isinstance(item, int):
        yield item // 2, shorter, True, False
        for value in {0, 1} - {item, item // 2}:
            yield value, f"with one sample's at {value}", True, True
        yield -1, "with one sample's at -1", False, True
    elif isinstance(item, float):
        yield item * 0.5 + 0.1, "with one sample's at another value", True, False
        for number in (0.0, math.nan):
            yield number, f"with one sample's at {number:g}", True, True
    elif isinstance(item, (str, bytes)):
        yield item[: len(item) // 2], shorter, True, False
    elif any(t.dim() for t in tensors(item)):
        yield map_tensors(_other_rows, item), shorter, True, False
    if item is not None:
        yield None, "with None for one sample", True, True


def _other_rows(tensor: Tensor) -> Tensor:
    if not tensor.dim():
        return tensor
    number = tensor.shape[0]
    return tensor[: (number + 1) // 2] if number > 1 else torch.cat([tensor, tensor])
