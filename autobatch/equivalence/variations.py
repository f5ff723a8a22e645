"""What a sample leaves open: the batch with one mask, length, label or list changed in one sample.

A loss that divides by a count is exact where all samples have the same count, and wrong in the
first batch where they have not. Each variation makes one count unequal.

Invariant: the batch that was given is not changed, and a variation changes its first sample alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autobatch.equivalence.replay import Reads
from autobatch.equivalence.weights import written
from autobatch.workload.layout import Flat, Group
from autobatch.workload.sample import Rows, named_tensors
from autobatch.workload.tree import Path, leaves, map_leaves, map_tensors

__all__ = ["Variation", "variations"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variation:
    """A batch in which one sample has another count than the others.

    Attributes:
        where: the part of the batch that is changed, as an expression.
        what: what the part holds now, in words that follow "where".
        is_usual: whether batches of this kind of data have such values without being asked to; an
            ignored label is none where each sample has one label only.
        rows: the batch.
    """

    where: str
    what: str
    is_usual: bool
    rows: Rows


def variations(rows: Rows, reads: Reads) -> Iterator[Variation]:
    """Yield the variations of a batch in what the loss reads.

    Args:
        rows: the batch.
        reads: the tensors that the loss computes with, and what it compares integers with; all
            tensors are changed if it knows none.
    """
    layout = rows.layout
    for path, tensor in named_tensors(rows.batch).items():
        role = layout.roles.get(path)
        if any(path[: len(known)] == known for known in layout.lists):
            continue
        if isinstance(role, Flat):
            if role.counts == "samples":
                yield from _moved_row(rows, path, tensor, role)
        elif role is not None and (not reads.storages or _address(tensor) in reads.storages):
            yield from _changed_values(rows, path, tensor, role, reads.constants)
    for path, leaf in leaves(rows.batch, stop=layout.stop):
        if isinstance(leaf, (list, tuple)) and len(leaf) == rows.size:
            yield from _shorter_item(rows, path, leaf)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _changed_values(
    rows: Rows, path: Path, tensor: Tensor, dim: int, constants: Collection[int]
) -> Iterator[Variation]:
    part = _half_of_first(tensor, dim)
    where = "half of one sample's" if part.dim() else "one sample's"
    for value, what in _values(part, constants):
        if torch.equal(torch.as_tensor(value, dtype=part.dtype).expand(part.shape), part):
            continue
        changed = map_tensors(Tensor.clone, rows.batch)
        _half_of_first(named_tensors(changed)[path], dim).copy_(torch.as_tensor(value))
        is_label = not tensor.is_floating_point() and tensor.dtype != torch.bool
        is_usual = part.dim() > 0 or not is_label or not bool(torch.as_tensor(value).lt(0).any())
        yield Variation(
            where=written(path),
            what=f"with {where} {what}",
            is_usual=is_usual,
            rows=replace(rows, batch=changed),
        )


def _half_of_first(tensor: Tensor, dim: int) -> Tensor:
    """Return a view of the second half of the first sample's entries; of all if it has one."""
    first = tensor.select(dim, 0)
    if not first.dim():
        return first
    half = first.shape[-1] // 2
    return first.narrow(-1, half, first.shape[-1] - half)


def _values(part: Tensor, constants: Collection[int]) -> Iterator[tuple[Any, str]]:
    """Yield other values for a part of a tensor, the likeliest to be ignored first."""
    if part.dtype == torch.bool:
        yield ~part, "reversed"
    elif part.is_floating_point():
        yield 0.0, "at 0"
        yield part * 0.5 + 0.1, "at other values"
    elif not part.is_complex():
        # Negative numbers where the loss asks for them alone: as lengths they crash some kernels.
        for value in dict.fromkeys([*sorted(constants), 0, 1]):
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
    changed = map_tensors(Tensor.clone, rows.batch)
    named_tensors(changed)[path].view(-1)[own[-1]] = rows.size - 1
    moved = named_tensors(changed)[path].view(-1).long()
    counts = torch.bincount(moved, minlength=rows.size).cumsum(0).tolist()
    group = Group(order=torch.argsort(moved, stable=True), ends=(0, *counts))
    groups: Mapping[str, Group] = {**layout.groups, role.group: group}
    yield Variation(
        where=written(path),
        what="with a row of one sample given to another",
        is_usual=True,
        rows=Rows(changed, replace(layout, groups=groups)),
    )


def _shorter_item(rows: Rows, path: Path, items: Any) -> Iterator[Variation]:
    """Halve the first item of a list of samples: a number, or the rows of its tensors."""
    first = items[0]
    if type(first) is int:
        shorter: Any = first // 2
    else:
        lengths = {t.shape[0] for _, t in leaves(first) if isinstance(t, Tensor) and t.dim()}
        if not lengths or max(lengths) < 2:
            return
        shorter = map_tensors(lambda t: t[: (t.shape[0] + 1) // 2] if t.dim() else t, first)

    def visit(at: Path, leaf: Any) -> Any:
        if at == path:
            return type(leaf)([shorter, *leaf[1:]])
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    yield Variation(
        where=written(path),
        what="with half of one sample's rows",
        is_usual=True,
        rows=replace(rows, batch=map_leaves(visit, rows.batch, stop=rows.layout.stop)),
    )
