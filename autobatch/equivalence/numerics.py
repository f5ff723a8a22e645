"""A dispatch mode that keeps ops in float64, and records random draws or gives recorded ones.

Invariant: outside of the mode, torch is as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autobatch.equivalence.draws import Draw, Draws, Span, rows_of
from autobatch.support.torch_private import TorchDispatchMode

__all__ = ["Condition", "Numerics", "Reads", "relative_difference"]

aten = torch.ops.aten

_EXACT = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
}

_FROM_TENSORS = {
    aten.normal,
    aten.multinomial,
    aten.poisson,
    aten.binomial,
    aten._standard_gamma,
    aten._sample_dirichlet,
}
"""Ops that draw from a distribution whose parameters are all of their tensors."""

_READS = {aten._local_scalar_dense, aten.equal}
"""Ops that hand a value to Python, where it can decide what runs next."""

_SLOPES = {aten.rrelu_with_noise, aten.rrelu_with_noise_}

Condition = tuple[str, float]
"""A sign of Python's for a comparison, and the number that entries are compared with."""

_SIGNS = {
    aten.eq: "==",
    aten.ne: "!=",
    aten.lt: "<",
    aten.le: "<=",
    aten.gt: ">",
    aten.ge: ">=",
}
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}

_NAN = {aten.isnan, aten.nansum, aten.nan_to_num}
"""Ops that treat NaN apart; `nanmean` and `isfinite` are made of such and of comparisons."""

_MOST_LISTED = 16
"""The most numbers that `isin` looks for and that are tried."""


@dataclass(slots=True)
class Reads:
    """What the code of the loss computes with.

    Attributes:
        storages: addresses of the memory of tensors.
        conditions: what tensors are compared with, such as `ignore_index`.
        compared: the finite numbers that the memory at an address was found equal to or not, such
            as the id of padding.
    """

    storages: set[int] = field(default_factory=set)
    conditions: set[Condition] = field(default_factory=set)
    compared: dict[int, set[float]] = field(default_factory=dict)

    def note(self, op: Any, args: Sequence[Any]) -> None:
        """Note what an op computes with and compares."""
        found = {arg.untyped_storage().data_ptr() for arg in _flat(args)}
        conditions = set(_conditions(op, args))
        self.storages |= found
        self.conditions |= conditions
        equal = {n for sign, n in conditions if sign in ("==", "!=") and math.isfinite(n)}
        for storage in found if equal else ():
            self.compared.setdefault(storage, set()).update(equal)

    @property
    def constants(self) -> list[float]:
        """The numbers that tensors are compared with, and those on both sides of a bound."""
        found: list[float] = []
        for sign, number in sorted(self.conditions, key=str):
            by = max(1.0, abs(number) / 1000) if sign in _FLIPPED and math.isfinite(number) else 0.0
            found += (number - by, number, number + by) if by else (number,)
        return sorted(set(found) - {math.nan}) + [n for n in found if n != n][:1]


class Numerics(TorchDispatchMode):
    """Keeps ops in float64 where asked to, and records random draws or gives recorded ones.

    Many models compute parts in float32 (norms, softmax, positions), which would leave rounding
    errors of 1e-7 in a float64 gradient.

    Attributes:
        draws: of the whole batch, recorded or given; None where draws are as in training.
        drawn: how many ops drew random numbers.
        unmatched: draws whose rows could not be found in the record.
        apart: how far the parameters of distributions are from those of the record.
        decides: whether Python read a value after a draw, so that other draws may run other code.
        ops: names of the ops that ran; None where nobody asked for them.
        reads: is told what is computed with; None where nobody asked for it.
    """

    def __init__(
        self, *, exact: bool, draws: Draws | None = None, rows: Span | None = None
    ) -> None:
        """Turn casts to lower precision into float64 if `exact`.

        Args:
            exact: whether the run is in float64.
            draws: of a whole batch: recorded, or given where `rows` are.
            rows: the samples that the run is about, of those of `draws`.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws = draws
        self._exact, self._rows = exact, rows
        self._position = 0
        self.drawn = self.unmatched = 0
        self.apart = 0.0
        self.decides = False
        self.ops: list[str] | None = None
        self.reads: Reads | None = None

    @contextmanager
    def part(self, rows: Span, *, position: int) -> Iterator[None]:
        """Give the draws from a position on by the rows of one micro-batch, inside the context."""
        before, self._rows, self._position = self._rows, rows, position
        try:
            yield
        finally:
            self._rows = before

    def restart(self, rows: Span) -> None:
        """Give the record from its beginning, by the rows of these samples."""
        self._rows, self._position = rows, 0

    def record(self) -> None:
        """Record from the beginning."""
        assert self.draws is not None
        self.draws.made.clear()
        self._rows = None

    @property
    def position(self) -> int:
        """How many draws of the record have been given."""
        return self._position

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        options = dict(kwargs or {})
        if self._exact and options.get("dtype") in _EXACT:
            options["dtype"] = _EXACT[options["dtype"]]
        self._note(func, args)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **options)
        before = torch.get_rng_state()
        result = func(*args, **options)
        if torch.equal(before, torch.get_rng_state()) and options.get("generator") is None:
            return result  # the op can draw but did not, as attention without dropout
        self.drawn += 1
        if self.draws is None:
            return result
        value = _drawn(func, args, result)
        if self._rows is None:
            self.draws.made.append(
                Draw(str(func), value.clone(), tuple(p.clone() for p in _parameters(func, args)))
            )
            return result
        return self._given(func, args, result, value, self.draws, self._rows)

    def _note(self, func: Any, args: Sequence[Any]) -> None:
        op = func.overloadpacket
        if self.drawn and op in _READS:
            self.decides = True
        if self.ops is not None:
            self.ops.append(str(func))
        if self.reads is not None and not getattr(func, "is_view", False):
            self.reads.note(op, args)

    def _given(
        self, func: Any, args: Sequence[Any], result: Any, value: Tensor, draws: Draws, rows: Span
    ) -> Any:
        """Replace what was drawn by the rows of the record."""
        index, self._position = self._position, self._position + 1
        then = draws.made[index] if index < len(draws.made) else None
        if then is None or then.op != str(func):
            self.unmatched += 1
            return result
        known = rows_of(then.value, value.shape, rows, draws.samples)
        mixes = func.overloadpacket is aten.randperm and then.value.shape != value.shape
        if known is None or mixes:  # part of a permutation is none
            self.unmatched += 1
            return result
        for now, old in zip(_parameters(func, args), then.parameters, strict=False):
            part = rows_of(old, now.shape, rows, draws.samples)
            if part is not None:
                self.apart = max(self.apart, relative_difference(now, part))
        value.copy_(known)
        if func.overloadpacket in _SLOPES:
            slopes = torch.where(args[0] <= 0, value, 1.0)
            return args[0].mul_(slopes) if result is args[0] else args[0] * slopes
        if func.overloadpacket is aten.native_dropout:
            return args[0] * value / (1 - args[1]), value
        return result


def _conditions(op: Any, args: Sequence[Any]) -> Iterator[Condition]:
    """Yield what an op compares entries of tensors with."""
    if op in _NAN:
        yield "!=", math.nan
    elif op in (aten.nll_loss_forward, aten.nll_loss2d_forward):
        numbers = [arg for arg in args if type(arg) is int]
        yield from (("!=", number) for number in numbers[-1:])  # it follows the reduction
    elif op is aten.isin and len(args) > 1:
        yield from (("==", number) for number in _numbers(args[1], _MOST_LISTED))
    elif op in _SIGNS and len(args) > 1:
        one, other = args[:2]
        sign = _SIGNS[op]
        if sign in ("==", "!=") and _is_same(one, other):
            yield "!=", math.nan  # all else is equal to itself
            return
        yield from ((sign, number) for number in _numbers(other, 1))
        yield from ((_FLIPPED.get(sign, sign), number) for number in _numbers(one, 1))


def _is_same(one: Any, other: Any) -> bool:
    """Say whether two arguments are the same entries in memory."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if one.layout is not torch.strided or other.layout is not torch.strided:
        return one is other
    layouts = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (one, other)]
    return one is other or layouts[0] == layouts[1]


def _numbers(value: Any, most: int) -> list[float]:
    """Return the numbers in a number, or in a tensor that is small enough to be one of them."""
    if type(value) in (int, float):
        return [value]
    if not isinstance(value, Tensor) or value.is_complex() or value.layout is not torch.strided:
        return []
    return [float(n) for n in value.flatten().tolist()] if value.numel() <= most else []


def relative_difference(now: Tensor, then: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    if not then.numel():
        return 0.0
    return float((now - then).abs().max()) / max(float(then.abs().max()), 1e-300)


def _drawn(func: Any, args: Sequence[Any], result: Any) -> Tensor:
    """Return the tensor that holds what an op drew: most return it, alone or as one of several."""
    if func.overloadpacket in _SLOPES:
        noise: Tensor = args[1]
        return noise
    if isinstance(result, Tensor):
        return result
    tensors = [part for part in result if isinstance(part, Tensor)]
    return tensors[1] if func.overloadpacket is aten.native_dropout else tensors[0]


def _parameters(func: Any, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """Return the floating-point tensors that make a distribution."""
    op, overload = func.overloadpacket, func._overloadname
    if op in _FROM_TENSORS:
        found = list(args)
    elif op is aten.bernoulli and overload == "default":
        found = [args[0]]
    elif op is aten.bernoulli_ and overload == "Tensor":
        found = [args[1]]
    else:
        found = []
    return tuple(p for p in found if isinstance(p, Tensor) and p.is_floating_point())


def _flat(args: Sequence[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.layout is torch.strided:
                yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _flat(arg)
