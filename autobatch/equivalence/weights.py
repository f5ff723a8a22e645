"""The weights that micro-batches may need: counts of what the batch holds, tried one by one."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from autobatch.equivalence.numerics import Condition
from autobatch.workload.layout import Layout
from autobatch.workload.tree import Path, is_array, leaves

__all__ = ["SUM", "shares", "tried_weights", "written"]

SUM = "1"
"""The weight expression of a loss that is a sum, so that micro-batches are added unweighted."""

IGNORED = -100
"""The label that losses ignore, PyTorch's default for `ignore_index`."""

_Counted = tuple[str, float]

_COMPARE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}

_MOST_PAIRED = 8
"""The most conditions of which two are tried together."""


def shares(weights: Sequence[float]) -> list[float]:
    """Return each micro-batch's share of the window's weight.

    >>> shares([3, 1])
    [0.75, 0.25]
    """
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def tried_weights(
    pieces: Sequence[Any],
    layout: Layout,
    conditions: Collection[Condition] = (),
    *,
    unread: Collection[Path] = (),
) -> Iterator[tuple[str, list[float]]]:
    """Yield possible weights of the micro-batches, each as an expression and their shares.

    The likeliest come first: those of parts that the loss reads, and of these entries for which a
    condition of the loss holds, or does not, unshifted and shifted as labels of language models
    are; two conditions; labels that are not ignored; entries that are not zero (padding); sums,
    such as those of lengths; rows of lists, such as boxes.

    Args:
        pieces: the micro-batches.
        layout: of the batch that they are cut from.
        conditions: of the loss.
        unread: parts of the batch that the loss does not read.
    """
    found = [dict(leaves(piece, stop=lambda path, _: path in layout.lists)) for piece in pieces]
    for paths in ([path for path in found[0] if path not in unread], unread):
        for count in _counts_of_arrays(sorted(conditions, key=str)):
            for path in paths:
                yield from _expressed(path, [count(one.get(path)) for one in found])
    for path in found[0]:
        if isinstance(found[0][path], (list, tuple)):
            for text, number in _of_items(found[0][path]):
                yield from _expressed(
                    path, [_applied(text, number, one.get(path)) for one in found]
                )
    yield SUM, [1.0] * len(pieces)


def _counts_of_arrays(
    conditions: Sequence[Condition],
) -> Iterator[Callable[[Any], _Counted | None]]:
    either = list(dict.fromkeys(each for one in conditions for each in _senses(one)))
    guesses: list[Condition] = [("!=", IGNORED), ("!=", 0), (">", 0)]
    if ("!=", IGNORED) in either:
        either.remove(("!=", IGNORED))
        either.insert(0, ("!=", IGNORED))
    yield from _singles(either)
    if len(conditions) <= _MOST_PAIRED:
        for pair in combinations(either, 2):
            if pair[0][1] != pair[1][1]:
                yield _entries(*pair)
    yield from _singles([one for one in guesses if one not in either])
    yield _total


def _singles(conditions: Sequence[Condition]) -> Iterator[Callable[[Any], _Counted | None]]:
    for one in conditions:
        yield _entries(one)
        if one[0] == "!=":
            yield _entries(one, shift=1)


def _senses(condition: Condition) -> tuple[Condition, ...]:
    """Return a condition and its opposite; of equality the opposite comes first."""
    sign, number = condition
    if number != number:
        return (("!=", number),)
    both = (condition, (_OPPOSITE[sign], number))
    return both[::-1] if sign == "==" else both


def _expressed(path: Path, found: Sequence[_Counted | None]) -> Iterator[tuple[str, list[float]]]:
    known = [one for one in found if one is not None]
    values = [value for _, value in known]
    texts = {text for text, _ in known}
    if len(known) == len(found) and len(texts) == 1 and min(values) >= 0 < sum(values):
        yield texts.pop().format(written(path)), shares(values)


def _entries(*conditions: Condition, shift: int = 0) -> Callable[[Any], _Counted | None]:
    """Return what counts the entries of an array for which conditions hold."""
    written = [_condition_text(*one) for one in conditions]
    cut = "[:, 1:]" if shift else ""
    text = written[0] if len(written) == 1 else " & ".join(f"({each})" for each in written)
    text = f"({text}).sum()".replace("{}", "{0}" + cut)

    def count(leaf: Any) -> _Counted | None:
        is_odd = any(not math.isfinite(number) for _, number in conditions)
        array = _array(leaf)
        if array is None or array.dim() < 1 + shift or (is_odd and array is not leaf):
            return None
        array = array[:, 1:] if shift else array
        held = [
            _are_other(array, number) if sign == "!=" else _COMPARE[sign](array, number)
            for sign, number in conditions
        ]
        return text, float(torch.stack(held).all(0).sum())

    return count


def _are_other(array: Tensor, number: float) -> Tensor:
    """Say which entries are other than a number, as `_condition_text` writes it."""
    if number != number:
        return ~array.isnan()
    return ~array.isinf() if math.isinf(number) else array != number


def _condition_text(sign: str, number: float) -> str:
    if sign == "!=" and not math.isfinite(number):
        return "~{}.isnan()" if number != number else "~{}.isinf()"
    if math.isinf(number):
        return f'{{}} {sign} float("{number}")'
    return f"{{}} {sign} {int(number) if number == int(number) else number!r}"


def _array(leaf: Any) -> Tensor | None:
    """Return an array of real numbers as a tensor."""
    if not is_array(leaf):
        return None
    try:
        array = torch.as_tensor(leaf)
    except (TypeError, ValueError):  # of objects
        return None
    return None if array.is_complex() else array


def _total(leaf: Any) -> _Counted | None:
    array = _array(leaf)
    return None if array is None or not array.dim() else ("{}.sum()", float(array.double().sum()))


def _of_items(items: Sequence[Any]) -> Iterator[tuple[str, Callable[[Any], float]]]:
    """Yield counts of a list of samples, as an expression and a function."""
    yield "sum(item is not None for item in {})", lambda some: sum(one is not None for one in some)
    first = next((item for item in items if item is not None), None)
    if (isinstance(first, Tensor) and first.dim()) or isinstance(first, (str, bytes)):
        yield "sum(map(len, {}))", lambda some: sum(map(len, some))
    if isinstance(first, (int, float)):
        yield "sum({})", sum
    if isinstance(first, Mapping):
        for key, value in first.items():
            if isinstance(value, Tensor) and value.dim():
                text = f"sum(len(item[{key!r}]) for item in {{}})".replace("'", '"')
                yield text, partial(_rows, key)


def _rows(key: Any, items: Sequence[Any]) -> float:
    return sum(len(item[key]) for item in items)


def _applied(text: str, number: Callable[[Any], float], items: Any) -> _Counted | None:
    try:
        return text, float(number(items))
    except (TypeError, KeyError, ValueError):  # another item is of another kind
        return None


def written(path: Sequence[str]) -> str:
    """Write how a part of a batch is reached.

    >>> written(("inputs", "0"))
    'batch["inputs"][0]'
    """
    keys = (key if key.isdecimal() else f'"{key}"' for key in path)
    return "batch" + "".join(f"[{key}]" for key in keys)
