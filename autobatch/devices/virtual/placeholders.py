"""How placeholders follow from each other: what the elements of an op's result read as.

A placeholder stands for all elements of a tensor. Comparisons, logic and constants are worked out
on the placeholders of the arguments; a view, a copy or a reduction of equal elements keeps theirs.

Invariant: no real value is read. A floating-point result has a placeholder only if those that it
follows from were given one: what is arithmetic on unknown floats reads as the default again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.elements import (
    WHOLE,
    explicit_placeholder,
    forget_placeholder,
    is_certain,
    placeholder_of,
    set_certain,
    set_most,
    set_placeholder,
    set_unbounded,
    values_of,
)

__all__ = ["MASKS", "follow_placeholders"]

MASKS = (torch.bool, torch.uint8)
"""Dtypes whose tensors choose elements when they are used as an index."""

_Rule = Callable[..., Any]

_TRUTHS: dict[str, _Rule] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **dict.fromkeys(("isnan", "isinf", "isposinf", "isneginf"), lambda value: False),
    **dict.fromkeys(("logical_not", "bitwise_not"), operator.not_),
    **dict.fromkeys(("any", "all"), lambda value, *dims: bool(value)),
    **dict.fromkeys(
        ("logical_and", "bitwise_and", "mul"), lambda first, second: bool(first and second)
    ),
}
"""Truth values, by op, from the placeholders of its arguments."""

_ANY_DTYPE: dict[str, _Rule] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero_"), lambda *args: 0),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), lambda *args: 1),
    **dict.fromkeys(("full", "full_like", "fill_"), lambda _, value, *args: value),
    "new_full": lambda _, size, value, *args: value,
    **dict.fromkeys(("logical_or", "bitwise_or"), lambda first, second: bool(first or second)),
}
"""Truth values and whole numbers, likewise."""

_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "rsub": lambda first, second: second - first,
    "mul": operator.mul,
}
_FILLED = frozenset(
    """
    zeros zeros_like new_zeros zero_ ones ones_like new_ones full_like fill_ new_full
    """.split()
)
_CONSTANTS = _FILLED - {"zero_", "fill_"} | {"full"}
"""Ops that make a tensor all of whose elements are one number, until it is written to."""

_KEEPING = frozenset(
    """
    _to_copy clone detach alias mean sum amax amin max min select slice view _unsafe_view reshape
    expand unsqueeze squeeze permute transpose t
    """.split()
)
"""Ops whose floating-point result reads as their argument does."""


_HEALTH = frozenset(("isnan", "isinf", "isposinf", "isneginf"))
"""Ops that look for numbers which no healthy run has."""

_KEEPING_CERTAINTY = _KEEPING | frozenset(
    """
    any all eq ne lt le gt ge mul logical_and bitwise_and logical_or bitwise_or
    logical_not bitwise_not count_nonzero
    """.split()
)
"""Ops on truth values which are as certain as those."""

_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))
_INFINITE = (math.inf, -math.inf)
_COUNTS = frozenset(("sum", "count_nonzero"))

_IN_SOME_PLACES = frozenset(
    ("masked_fill_", "index_put_", "_index_put_impl_", "clamp_", "scatter_")
)
"""Ops that write to a tensor of which the rest stays."""


def follow_placeholders(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
) -> None:
    """Give the result of an op that has just run the placeholder that follows, if any does."""
    if not isinstance(output, Tensor):
        return
    if args and output is args[0] and not _writes_nothing(name, args):
        forget_placeholder(output, keeps_bounds=name in _IN_SOME_PLACES)
    if output.dtype.is_floating_point:
        value = None if "alpha" in kwargs else _float(name, args)
    else:
        value = _whole(name, args, output.dtype)
    if value is not None:
        set_placeholder(output, value)
    is_constant = name in _CONSTANTS and not isinstance(_ANY_DTYPE[name](*args), Tensor)
    if is_constant or name in _HEALTH or (name in _KEEPING_CERTAINTY and _is_certain(name, args)):
        set_certain(output)
        if name in _COUNTS and not is_constant:  # of elements that are all alike
            each = placeholder_of(args[0])
            each = bool(each) if name == "count_nonzero" else each
            set_placeholder(output, each * (args[0].numel() // max(output.numel(), 1)))
    elif name in _COUNTS and not output.dim() and args and args[0].dtype is torch.bool:
        set_most(output, args[0].numel())
        if placeholder_of(args[0]):  # each of them is true
            set_placeholder(output, args[0].numel())
    elif name in _COMPARISONS and not output.dim() and any(map(_is_anything, args[:2])):
        set_unbounded(output)


def _is_anything(value: Any) -> bool:
    """Whether a value is a whole number on the GPU of which nothing is known: it reads as one."""
    is_number = isinstance(value, Tensor) and value.dtype in WHOLE and value.dtype not in MASKS
    return is_number and placeholder_of(value) == 1 and values_of(value) is None


def _is_certain(name: str, args: Sequence[Any]) -> bool:
    """Whether a truth value follows from what a healthy run gives, or says that a number is one."""
    if name in ("eq", "ne"):  # `isfinite` asks whether a number is itself, and is not infinite
        is_plain = not isinstance(args[1], Tensor)
        return args[0] is args[1] or (is_plain and args[1] in _INFINITE) or is_certain(args[0])
    held = [arg for arg in args if isinstance(arg, Tensor)]
    return bool(held) and all(map(is_certain, held))


def _writes_nothing(name: str, args: Sequence[Any]) -> bool:
    """Whether an op writes where a mask is true, and the mask reads as false everywhere."""
    if name == "masked_fill_":
        return not placeholder_of(args[1])
    if name in ("index_put_", "_index_put_impl_"):
        masks = [i for i in args[1] if i is not None and i.dtype in MASKS]
        return any(not placeholder_of(mask) for mask in masks)
    return False


def _float(name: str, args: Sequence[Any]) -> float | None:
    """Return the placeholder of a floating-point result; None for the default."""
    if name in _KEEPING:
        return explicit_placeholder(args[0]) if args and isinstance(args[0], Tensor) else None
    if name in _ARITHMETIC:
        first, second = map(explicit_placeholder, args[:2])
        return None if first is None or second is None else _ARITHMETIC[name](first, second)
    if name in ("scalar_tensor", "full"):
        return explicit_placeholder(args[-1])
    if name in _FILLED:
        return explicit_placeholder(_ANY_DTYPE[name](*args))
    if name == "where" and len(args) == 3:
        return explicit_placeholder(args[1 if placeholder_of(args[0]) else 2])
    if name == "masked_fill":
        return explicit_placeholder(args[2 if placeholder_of(args[1]) else 0])
    return None


def _whole(name: str, args: Sequence[Any], dtype: torch.dtype) -> Any:
    """Return the placeholder of a truth value or a whole number; None for the default."""
    rule = _TRUTHS.get(name) if dtype is torch.bool else None
    rule = rule or _ANY_DTYPE.get(name)
    if rule is not None:
        return rule(*map(placeholder_of, args))
    if not args or not isinstance(args[0], Tensor):
        return None
    if args[0].dtype.is_floating_point:
        value = explicit_placeholder(args[0]) if name == "_to_copy" else None
        if value is None or not math.isfinite(value):
            return None
    else:
        value = placeholder_of(args[0])  # a view, a copy or a reduction of equal elements
    return bool(value) if dtype is torch.bool else int(value)
