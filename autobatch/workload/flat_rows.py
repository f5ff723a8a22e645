"""Flat rows: tensors that hold all rows of all samples, told apart by an index of their sample.

Invariant: values are only looked at where they can be read, which those of fake tensors cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from autobatch.support.torch_private import detect_fake_mode
from autobatch.workload.layout import Flat, Group, Role, covers, dotted, is_named_index
from autobatch.workload.tree import Path

__all__ = ["counted", "flat_rows", "may_be_indexed", "sizes_by_index"]


def flat_rows(
    fields: Mapping[Path, Any], size: int, stated: Mapping[Path, int | str | None]
) -> tuple[dict[str, Group], dict[Path, Role]]:
    """Return the flat rows of tensors that have an index of their sample.

    Args:
        fields: the tensors and arrays of a batch.
        size: its number of samples.
        stated: what `batch_dims` says of them: the name of such an index, among others.
    """
    groups: dict[str, Group] = {}
    roles: dict[Path, Role] = {}
    says = {dim for dim in stated.values() if isinstance(dim, str) and dim != "list"}
    for path, leaf in fields.items():
        is_named = is_named_index(path) or any(covers(name, path) for name in says)
        if not is_named or path in stated or _top_index(leaf, size) is None:
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
        for edges, ends in _edges(fields, len(owners)).items():
            if edges in stated:
                continue
            groups[of_edges := dotted(edges)] = _group(owners[ends[0]], size)
            roles[edges] = Flat(dim=1, group=of_edges, counts=name)
            for other, tensor in fields.items():
                is_of_edges = other and "edge" in other[-1] and tensor.shape[0] == ends.shape[1]
                if is_of_edges and other != edges:
                    roles[other] = Flat(dim=0, group=of_edges)
    return groups, roles


def _edges(fields: Mapping[Path, Any], rows: int) -> dict[Path, Tensor]:
    """Return the tensors whose columns are edges between flat rows, by the numbers of two rows."""
    found = {}
    for path, leaf in fields.items():
        is_edge = path and "edge_index" in path[-1] and tuple(leaf.shape[:-1]) == (2,)
        if is_edge and leaf.shape[1]:
            ends = torch.as_tensor(leaf).cpu()
            if _has_values(ends) and int(ends.max()) < rows:
                found[path] = ends
    return found


def sizes_by_index(fields: Mapping[Path, Any], sizes: Iterable[int]) -> list[int]:
    """Return which numbers of samples a tensor named as the index of each row's sample allows.

    Args:
        fields: the tensors and arrays of a batch.
        sizes: those that other dimensions allow.

    Returns:
        None where there is no such tensor; several, the smallest first, where its last sample may
        have no rows.
    """
    for path, leaf in fields.items():
        if is_named_index(path) and (top := _top_index(leaf)) is not None:
            larger = sorted(size for size in sizes if size > top and size != leaf.shape[0])
            return [top + 1] if top + 1 in larger or not larger else larger
    return []


def counted(fields: Mapping[Path, Any]) -> set[int]:
    """Return the numbers of samples that tensors named as an index of their sample count."""
    tops = (_top_index(leaf) for path, leaf in fields.items() if is_named_index(path))
    return {top + 1 for top in tops if top is not None}


def may_be_indexed(fields: Mapping[Path, Any], rows: int, size: int) -> bool:
    """Say whether rows that outnumber `size` samples may belong to them by a nameless index."""
    if size >= rows:
        return False
    tops = (_top_index(leaf) for leaf in fields.values() if leaf.shape[0] == rows)
    return any(top is not None and top == size - 1 for top in tops)


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
