"""A call of an op as a shape and numbers, so that a rule can be asked of it at other sizes.

The numbers are the sizes and strides of tensors, and other whole numbers; the shape is the rest:
how many dimensions, which dtypes, which flags.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.scratch import Steps
from autobatch.memory.trace import Kernel

__all__ = ["Hashed", "Rule", "described", "on_card", "steps_of"]

Rule = Callable[[Any, Sequence[Any], Mapping[str, Any], GpuSpec], Steps]

_MOST_CALLS = 4096


def described(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Hashable, tuple[int, ...]]:
    """Return the shape and the numbers of a call.

    >>> described((torch.empty(2, 3, device="meta"), 1, True), {})[1]
    (2, 3, 3, 1, 1)
    """
    numbers: list[int] = []
    shape = _shape(args, numbers)
    named = tuple((name, _shape(value, numbers)) for name, value in kwargs.items())
    return (shape, named), tuple(numbers)


def _shape(value: Any, numbers: list[int]) -> Hashable:
    if isinstance(value, Tensor):
        numbers += value.shape
        numbers += value.stride()
        return ("tensor", value.dim(), value.dtype)
    if isinstance(value, (list, tuple)):
        return ("list", tuple(_shape(part, numbers) for part in value))
    if type(value) is int:
        numbers.append(value)
        return ("number",)
    try:
        hash(value)
    except TypeError:
        return ("value", None)  # no rule asks for it
    return ("value", value)


@functools.lru_cache(_MOST_CALLS)
def steps_of(
    rule: Rule, func: Any, shape: Any, gpu: Hashed, numbers: tuple[int, ...]
) -> tuple[int | str, ...]:
    """Ask a rule of a call, and remember the answer.

    Args:
        rule: one of `workspaces.py`.
        func: the op.
        shape: as `described` returns it.
        gpu: the card.
        numbers: as `described` returns them.
    """
    left = iter(numbers)
    placed, named = shape
    args = _restored(placed, left)
    kwargs = {name: _restored(part, left) for name, part in named}
    return tuple(rule(func, args, kwargs, gpu.spec))


def on_card(kernel: Kernel, gpu: Hashed) -> Kernel:
    """Return a kernel that ran on one card as it runs on another, whose rules are asked."""
    takes = kernel.takes
    assert isinstance(takes, functools.partial) and takes.func is steps_of
    rule, func, shape, _ = takes.args
    return replace(kernel, takes=functools.partial(steps_of, rule, func, shape, gpu))


def _restored(shape: Any, numbers: Iterator[int]) -> Any:
    kind, *rest = shape
    if kind == "tensor":
        dims, dtype = rest
        sizes = [next(numbers) for _ in range(dims)]
        strides = [next(numbers) for _ in range(dims)]
        return torch.empty_strided(sizes, strides, dtype=dtype, device="meta")
    if kind == "list":
        return [_restored(part, numbers) for part in rest[0]]
    return next(numbers) if kind == "number" else rest[0]


class Hashed:
    """A card as a key: its description holds tables, which have no hash."""

    def __init__(self, spec: GpuSpec) -> None:
        """Stand for a card."""
        self.spec = spec
        self._hash = hash((spec.name, spec.compute_capability, spec.multiprocessors))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Hashed):
            return False
        return other.spec is self.spec or other.spec == self.spec

    def __hash__(self) -> int:
        return self._hash
