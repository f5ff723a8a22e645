"""Sequences without tensors in a batch: names, weights or sizes, one for each sample or not.

Invariant: a sequence with as many values as there are samples is cut where that is no accident;
where it may be one, as (224, 224) beside two images, it is an error that asks, never a guess.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from autobatch.errors import SampleError
from autobatch.workload.layout import HANDFUL, Layout, dotted
from autobatch.workload.tree import Path, holds_tensor, leaves

__all__ = ["is_sequence", "refuse_doubt", "repeated", "sequences_of", "some_of"]

_NO_SEQUENCE = (Tensor, str, bytes, bytearray, memoryview, torch.Size)
_COLUMNS = ("pandas", "polars", "pyarrow")
"""Libraries whose columns have an entry for each row."""

_IN_DOUBT = (int, float, complex, type(None), tuple, list)
"""Types of what a size, a range or a padding is made of."""


def is_sequence(node: Any) -> bool:
    """Say whether a value is a sequence in which there is no tensor.

    >>> [is_sequence(node) for node in ((1, 2), deque("ab"), range(3), "text", torch.Size([2]))]
    [True, True, True, False, False]
    """
    if isinstance(node, _NO_SEQUENCE) or hasattr(node, "_fields"):
        return False
    if isinstance(node, (list, tuple, deque)):
        return not any(map(holds_tensor, node))
    is_column = type(node).__module__.partition(".")[0] in _COLUMNS
    return isinstance(node, (Sequence, array)) or (is_column and hasattr(node, "__len__"))


def sequences_of(
    batch: Any,
    size: int,
    *,
    stop: Callable[[Path, Any], bool],
    stated: Mapping[Path, Any] | None = None,
    like: Layout | None = None,
) -> dict[Path, bool | None]:
    """Say of each sequence whether it has one value for each sample; None where that is in doubt.

    Args:
        batch: the batch.
        size: its number of samples.
        stop: of containers, whether they are something else that is not looked into.
        stated: what `batch_dims` says of some.
        like: the layout of a batch before this one: two sizes tell what belongs to the samples.
    """
    found: dict[Path, bool | None] = {}

    def is_end(path: Path, node: Any) -> bool:
        return stop(path, node) or (isinstance(node, deque) and is_sequence(node))

    for path, leaf in leaves(batch, stop=is_end):
        if stop(path, leaf) or not is_sequence(leaf):
            continue
        if stated and path in stated:
            found[path] = _as_stated(path, leaf, size, stated[path])
        elif like is not None and path in like.sequences:
            found[path] = _as_before(leaf, size, like, like.sequences[path])
        else:
            found[path] = _by_length(leaf, size)
    return found


def _as_stated(path: Path, leaf: Any, size: int, dim: int | str | None) -> bool | None:
    if dim is None:
        return False
    if dim == "list" and len(leaf) != size:
        raise SampleError(
            f"batch_dims says that {dotted(path)} has an entry for each sample, but it has "
            f"{len(leaf)}, and the batch {size} samples"
        )
    return len(leaf) == size if dim in ("list", 0) else _by_length(leaf, size)


def _as_before(leaf: Any, size: int, like: Layout, known: bool | None) -> bool | None:
    fits = len(leaf) == size
    if known is None:
        return None if size == like.size else fits
    return known if fits or not known else None


def _by_length(leaf: Any, size: int) -> bool | None:
    if len(leaf) != size:
        return False
    if not isinstance(leaf, tuple) or size > HANDFUL:
        return True
    if all(isinstance(item, (str, bytes, Mapping)) for item in leaf):
        return True
    is_of_one_kind = len(set(map(type, leaf))) == 1
    return True if is_of_one_kind and not isinstance(leaf[0], _IN_DOUBT) else None


def refuse_doubt(path: Path, leaf: Any, size: int) -> None:
    """Refuse a sequence that may have one value for each sample, or be the same for all.

    Raises:
        SampleError: always.
    """
    name = dotted(path)
    why = "" if len(leaf) == size else ", and a batch before had as many of them as samples"
    raise SampleError(
        f"{name} is a {type(leaf).__name__} of {len(leaf)} values beside {size} samples{why}: pass "
        f'batch_dims={{{name!r}: "list"}} if each sample has one of them, or '
        f"batch_dims={{{name!r}: None}} if every micro-batch needs all (with tune: "
        "Workload(model=model, batch=autobatch.batch_builder(sample, batch_dims=…)))"
    )


def some_of(leaf: Any, start: int, stop: int) -> Any:
    """Return entries `start` to `stop` of a sequence, in its own type.

    >>> some_of(deque("abcd"), 1, 3), some_of((1, 2, 3), 0, 2)
    (deque(['b', 'c']), (1, 2))
    """
    if isinstance(leaf, deque):
        return type(leaf)(islice(leaf, start, stop))
    return leaf.iloc[start:stop] if hasattr(leaf, "iloc") else leaf[start:stop]


def repeated(leaf: Any, order: Sequence[int], fresh: Callable[[Any], Any]) -> Any:
    """Return entries of a sequence by their positions, which may repeat, each made fresh.

    >>> repeated(range(5, 7), [0, 1, 0], lambda item: item)
    [5, 6, 5]
    """
    if isinstance(leaf, array):
        return array(leaf.typecode, (leaf[row] for row in order))
    if hasattr(leaf, "iloc"):
        return leaf.iloc[list(order)]
    if not isinstance(leaf, Sequence):
        return leaf.take(order) if hasattr(leaf, "take") else leaf[list(order)]
    items = [fresh(leaf[row]) for row in order]
    return items if isinstance(leaf, range) else type(leaf)(items)  # type: ignore[call-arg]
