"""The weights that micro-batches may need: counts of what the batch holds, tried one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from autobatch.workload.layout import Layout
from autobatch.workload.tree import Path, leaves

__all__ = ["SUM", "shares", "tried_weights", "written"]

SUM = "1"
"""The weight expression of a loss that is a sum, so that micro-batches are added unweighted."""

IGNORED = -100
"""The label that losses ignore, PyTorch's default for `ignore_index`."""

_Counted = tuple[str, float]


def shares(weights: Sequence[float]) -> list[float]:
    """Return each micro-batch's share of the window's weight.

    >>> shares([3, 1])
    [0.75, 0.25]
    """
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def tried_weights(
    pieces: Sequence[Any], layout: Layout, constants: Collection[float] = ()
) -> Iterator[tuple[str, list[float]]]:
    """Yield possible weights of the micro-batches, each as an expression and their shares.

    The likeliest come first: labels that are not ignored, unshifted and shifted as in language
    models; then entries that are not zero (padding); then sums, such as those of lengths; then
    rows of lists, such as boxes.

    Args:
        pieces: the micro-batches.
        layout: of the batch that they are cut from.
        constants: what the loss compares with; labels of these values may be ignored.
    """
    found = [dict(leaves(piece, stop=lambda path, _: path in layout.lists)) for piece in pieces]
    whole = sorted({int(value) for value in constants if value == value // 1})
    ignored = [IGNORED, *(value for value in whole if value not in (IGNORED, 0)), 0]
    counts: list[Callable[[Any], _Counted | None]] = [_labels(IGNORED), _labels(IGNORED, shift=1)]
    counts += [_labels(value) for value in ignored[1:]]
    counts += [_labels(value, shift=1) for value in ignored[1:]]
    counts += [_positive, _total]
    for count in counts:
        for path in found[0]:
            yield from _expressed(path, [count(one.get(path)) for one in found])
    for path in found[0]:
        if isinstance(found[0][path], (list, tuple)):
            for count in _of_items(found[0][path]):
                yield from _expressed(path, [count(one.get(path)) for one in found])
    yield SUM, [1.0] * len(pieces)


def _expressed(path: Path, found: Sequence[_Counted | None]) -> Iterator[tuple[str, list[float]]]:
    known = [one for one in found if one is not None]
    values = [value for _, value in known]
    texts = {text for text, _ in known}
    if len(known) == len(found) and len(texts) == 1 and min(values) >= 0 < sum(values):
        yield texts.pop().format(written(path)), shares(values)


def _labels(ignored: int, shift: int = 0) -> Callable[[Any], _Counted | None]:
    def count(leaf: Any) -> _Counted | None:
        if not isinstance(leaf, Tensor) or leaf.dim() < 1 + shift:
            return None
        counted, cut = (leaf[:, 1:], "[:, 1:]") if shift else (leaf, "")
        return f"({{}}{cut} != {ignored}).sum()", float((counted != ignored).sum())

    return count


def _positive(leaf: Any) -> _Counted | None:
    if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.is_complex():
        return None
    return "({} > 0).sum()", float((leaf > 0).sum())


def _total(leaf: Any) -> _Counted | None:
    if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.is_complex():
        return None
    return "{}.sum()", float(leaf.double().sum())


def _of_items(items: Sequence[Any]) -> Iterator[Callable[[Any], _Counted | None]]:
    """Yield counts of the rows in a list of samples."""
    first = items[0] if items else None
    if isinstance(first, Tensor) and first.dim():
        yield lambda some: ("sum(map(len, {}))", float(sum(map(len, some))))
    if isinstance(first, (int, float)):
        yield lambda some: ("sum({})", float(sum(some)))
    if isinstance(first, Mapping):
        for key, value in first.items():
            if isinstance(value, Tensor) and value.dim():
                yield _rows(key)


def _rows(key: Any) -> Callable[[Any], _Counted | None]:
    text = f"sum(len(item[{key!r}]) for item in {{}})".replace("'", '"')
    return lambda some: (text, float(sum(len(item[key]) for item in some)))


def written(path: Sequence[str]) -> str:
    """Write how a part of a batch is reached.

    >>> written(("inputs", "0"))
    'batch["inputs"][0]'
    """
    keys = (key if key.isdecimal() else f'"{key}"' for key in path)
    return "batch" + "".join(f"[{key}]" for key in keys)
