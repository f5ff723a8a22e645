"""Whole numbers that vary from element to element, and masks made of them.

Labels, routes to experts and other choices are not one number. Where a tensor's elements vary
within bounds (class labels of a sample, what `argmax` or `topk` found), a comparison with one
number is true for some and false for others: a *mixed* mask. There is one (`any`), not all are
(`all`), and their count is positive, so code that skips what is not there, or takes a shortcut
where all is there, runs in full. A mixed mask counts as many true elements as it has, or its share
of them where one is known: of numbers that are compared with each of E others, an E-th (`Guesses`).

Invariant: what is said of a tensor here holds for every element, or is an upper bound.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.elements import (
    WHOLE,
    bounds_of,
    has_values,
    is_mixed,
    is_varied,
    mixed_share,
    origin_of,
    placeholder_of,
    set_bounds,
    set_mixed,
    set_placeholder,
    values_of,
    was_zero,
)
from autobatch.memory.rounding import part_of, rounded_up
from autobatch.support.torch_private import FakeTensor

__all__ = ["follow_varied", "true_part"]

_ALIKE = frozenset(
    """
    _to_copy clone detach alias select slice view _unsafe_view reshape expand unsqueeze squeeze
    permute transpose t index_select index gather flip roll repeat unfold as_strided contiguous
    narrow _reshape_alias lift_fresh masked_select diagonal view_copy reshape_copy
    """.split()
)
"""Ops whose elements are some of their argument's."""

_PARTS = frozenset("unbind split split_with_sizes chunk".split())
_INTERVALS = frozenset("add sub mul remainder clamp masked_fill where minimum maximum".split())
_EITHER = frozenset(("logical_or", "bitwise_or", "logical_xor"))
_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))
_CHOICES = {"argmax": 0, "argmin": 0, "topk": 1, "max": 1, "min": 1, "sort": 1, "argsort": 0}
"""Ops that choose along a dimension, and which of their results holds the choices."""


def true_part(mask: Any) -> Fraction | None:
    """Return which part of the elements of a mixed mask is true, at most; None of any other mask.

    The count of true elements is the part rounded up.
    """
    share = mixed_share(mask)
    return None if share is None else part_of(mask.numel(), share)


def follow_varied(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: Any,
    share_of: Callable[[object, object], float],
) -> None:
    """Give the result of an op that has just run what follows from varied numbers, if any are read.

    `share_of` takes the origin of numbers and what they are compared with, and returns which share
    of them is equal to it, at most.
    """
    first = args[0] if args else None
    if not isinstance(first, FakeTensor):
        if name == "randint" and isinstance(output, FakeTensor):
            low, high = (0, args[0]) if len(args) == 2 else (args[0], args[1])
            set_bounds(output, low, high - 1)
        return
    if name in _CHOICES:
        _choose(name, args, kwargs, output)
    elif name in _PARTS:
        for part in output if isinstance(output, (list, tuple)) else ():
            _same(first, part)
    elif name in ("scatter", "scatter_"):
        _scatter(args, output)
    elif name in ("index_put_", "_index_put_impl_"):
        _mark(args, output)
    elif not isinstance(output, FakeTensor) or output is first:
        return
    elif name in _COMPARISONS:
        _compare(name, first, args[1], output, share_of)
    elif name in ("amax", "amin") and is_varied(first):
        set_placeholder(output, _bound(first, 1 if name == "amax" else 0))
    elif name == "multinomial":
        set_bounds(output, 0, first.shape[-1] - 1)
    elif is_mixed(first):
        _mix(name, args, first, output)
    elif name in _ALIKE:
        _same(first, output)
    elif name in _INTERVALS and output.dtype in WHOLE and len(args) > 1:
        _compute(name, args, kwargs, output)
    elif len(args) > 1 and name in ("mul", "logical_and", "bitwise_and") and is_mixed(args[1]):
        _mix(name, (args[1], first), args[1], output)


def _choose(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
    first: Tensor = args[0]
    if isinstance(output, Tensor):
        if name in ("max", "min"):
            if is_varied(first) and len(args) == 1:
                set_placeholder(output, _bound(first, 1 if name == "max" else 0))
            return
        chosen = output
    else:
        chosen = output[_CHOICES[name]]
    dims = [value for value in args[1:] if type(value) is int]
    dim = dims[-1] if dims else kwargs.get("dim", -1)
    if name == "topk":
        dim = args[2] if len(args) > 2 else -1
    if name in ("argmax", "argmin") and (len(args) < 2 or args[1] is None):
        return
    if not first.dim() or chosen.dtype not in WHOLE:
        return
    set_bounds(chosen, 0, first.shape[dim] - 1)


def _compute(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
    """Give the result of arithmetic on varied numbers the bounds that follow."""
    given = (
        args[1:3] if name == "where" else (args[0], *args[2:3]) if name == "masked_fill" else args
    )
    if kwargs or not any(map(is_varied, given)):
        return
    spans = [_span(value) for value in given]
    if name in ("where", "masked_fill"):
        ends = [end for span in spans for end in span]
    elif name == "clamp":
        low, high = args[1], args[2] if len(args) > 2 else None
        ends = [
            min(max(end, low if low is not None else end), high if high is not None else end)
            for end in spans[0]
        ]
    elif name == "remainder":
        ends = [0, max(0, spans[1][1] - 1)]
    else:
        compute: Callable[[Any, Any], Any] = {
            "add": operator.add,
            "sub": operator.sub,
            "mul": operator.mul,
            "minimum": lambda a, b: min(a, b),
            "maximum": lambda a, b: max(a, b),
        }[name]
        ends = [compute(a, b) for a in spans[0] for b in spans[1]]
    if all(type(end) is int for end in ends):
        set_bounds(output, min(ends), max(ends))


def _span(value: Any) -> tuple[Any, Any]:
    """Return the smallest and largest number that an argument stands for."""
    if is_varied(value):
        return bounds_of(value) or (0, 0)
    number = placeholder_of(value)
    return number, number


def _scatter(args: Sequence[Any], output: Tensor) -> None:
    """Say how many are true where ones are written at chosen places, as `one_hot` does."""
    if len(args) == 4 and type(args[3]) is int and args[3] == 1 and is_varied(args[2]):
        set_mixed(output, args[2].shape[args[1]] / max(1, output.shape[args[1]]))
        set_placeholder(output, 1)


def _mark(args: Sequence[Any], output: Tensor) -> None:
    """Say how many are true where ones are written at listed places of a table of zeros."""
    target, places, values = args[:3]
    if not was_zero(target) or values.numel() != 1 or (len(args) > 3 and args[3]):
        return
    known = values_of(values)
    if (placeholder_of(values) if known is None else known.item()) != 1:
        return
    chosen = [place for place in places if place is not None]
    if any(place.dtype in (torch.bool, torch.uint8) for place in chosen):
        return  # how many places a mask chooses is its own matter
    rest = [size for size, place in zip(target.shape, places, strict=False) if place is None]
    rest += target.shape[len(places) :]
    count = math.prod(torch.broadcast_shapes(*(place.shape for place in chosen))) * math.prod(rest)
    set_mixed(output, min(1.0, count / max(1, target.numel())))
    set_placeholder(output, 1)


def _same(first: Tensor, output: Any) -> None:
    if not isinstance(output, FakeTensor):
        return
    share, bounds = mixed_share(first), bounds_of(first)
    if share is not None:
        set_mixed(output, share)
        set_placeholder(output, 1 if output.dtype is not torch.bool else True)
    elif bounds is not None and output.dtype in WHOLE and output.dtype is not torch.bool:
        set_bounds(output, *bounds, origin=origin_of(first))


def _compare(
    name: str,
    first: Tensor,
    second: Any,
    output: Tensor,
    share_of: Callable[[object, object], float],
) -> None:
    if is_varied(first):
        bounds = bounds_of(first)
        assert bounds is not None
        is_plain = isinstance(second, (int, float))
        if is_plain and name in ("eq", "ne") and not bounds[0] <= second <= bounds[1]:
            set_placeholder(output, name == "ne")
            return
        share = 1.0
        if name == "eq":
            others = second.numel() if isinstance(second, Tensor) and has_values(second) else 1
            share = 1 / others if others > 1 else share_of(origin_of(first), second)
        set_mixed(output, share)
        set_placeholder(output, True)
    elif is_varied(second) and isinstance(second, Tensor):
        set_mixed(output, 1.0)
        set_placeholder(output, True)
    elif is_mixed(first) and isinstance(second, (int, float)):
        share = mixed_share(first) or 1.0
        is_same = (name, second) in (("eq", 1), ("ne", 0), ("gt", 0), ("ge", 1))
        set_mixed(output, share if is_same else 1.0)
        set_placeholder(output, True)


def _mix(name: str, args: Sequence[Any], first: Tensor, output: Tensor) -> None:
    """Say what an op on a mixed tensor gives."""
    share = mixed_share(first) or 1.0
    is_whole = len(args) < 2 or args[1] is None or (type(args[1]) is list and not args[1])
    if name in _ALIKE:
        _same(first, output)
    elif name == "all" and is_whole and output.dtype is torch.bool:
        set_placeholder(output, False)
    elif name == "any":
        if not is_whole and 0 < output.numel() <= first.numel():  # at most one each
            set_mixed(output, min(1.0, share * first.numel() / output.numel()))
        set_placeholder(output, True)
    elif name == "all":
        set_mixed(output, 1.0)
        set_placeholder(output, True)
    elif name in ("sum", "count_nonzero"):
        count = 1 if output.dim() else max(1, rounded_up(part_of(first.numel(), share)))
        set_placeholder(output, float(count) if output.dtype.is_floating_point else count)
    elif name == "mean":
        set_placeholder(output, share)
    elif name in _EITHER and isinstance(args[1], Tensor):
        other = mixed_share(args[1])
        if other is None:
            other = 1.0 if placeholder_of(args[1]) else 0.0
        wider = max(1, output.numel() // max(1, first.numel()))  # one of them may be expanded
        set_mixed(output, min(1.0, share + other) if wider == 1 else 1.0)
        set_placeholder(output, True)
    elif name in ("logical_not", "bitwise_not", *_EITHER):
        set_mixed(output, 1.0)
        set_placeholder(output, True)
    elif name in ("logical_and", "bitwise_and", "mul") and output.dtype in WHOLE:
        other = mixed_share(args[1]) if isinstance(args[1], Tensor) else None
        set_mixed(output, min(share, other or 1.0))
        set_placeholder(output, 1)


def _bound(tensor: Tensor, index: int) -> int:
    bounds = bounds_of(tensor)
    assert bounds is not None
    return bounds[index]
