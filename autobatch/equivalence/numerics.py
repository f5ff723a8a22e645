"""A dispatch mode that keeps ops in float64, and counts random draws or replaces them by means.

Invariant: outside of the mode, torch is as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.support.torch_private import TorchDispatchMode

__all__ = ["Numerics"]

aten = torch.ops.aten

_EXACT = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
}


class Numerics(TorchDispatchMode):
    """Keeps ops in float64 where asked to, and counts random draws or replaces them by their means.

    Many models compute parts in float32 (norms, softmax, positions), which would leave rounding
    errors of 1e-7 in a float64 gradient.

    Attributes:
        draws: how many ops drew random numbers.
    """

    def __init__(self, *, exact: bool, hold: bool) -> None:
        """Turn casts to lower precision into float64 if `exact`; replace draws if `hold`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._exact, self._hold = exact, hold
        self.draws = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        options = dict(kwargs or {})
        if self._exact and options.get("dtype") in _EXACT:
            options["dtype"] = _EXACT[options["dtype"]]
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **options)
        before = torch.get_rng_state()
        result = func(*args, **options)
        if torch.equal(before, torch.get_rng_state()) and options.get("generator") is None:
            return result  # the op can draw but did not, as attention without dropout
        self.draws += 1
        if not self._hold:
            return result
        mean = _MEANS.get(func.overloadpacket)
        if mean is not None and isinstance(result, Tensor):
            value = mean(*args)
            return result.copy_(value) if isinstance(value, Tensor) else result.fill_(value)
        torch.manual_seed(0)
        return func(*args, **options)


def _probability(_: Tensor, p: float | Tensor = 0.5, *rest: Any) -> float | Tensor:
    return p


def _middle(_: Tensor, low: float = 0.0, high: float = 1.0) -> float:
    return (low + high) / 2


def _middle_integer(*args: Any) -> int:
    bounds = [arg for arg in args if isinstance(arg, int)]
    return sum(bounds[:2]) // 2


def _middle_slopes(x: Tensor, noise: Tensor, low: float, high: float, *_: Any) -> Tensor:
    noise.copy_(torch.where(x <= 0, (low + high) / 2, 1.0))  # the backward pass reads it
    return x * noise


_MEANS: dict[Any, Callable[..., float | Tensor]] = {
    aten.bernoulli_: _probability,
    aten.bernoulli: lambda probabilities, p=None: probabilities if p is None else p,
    aten.uniform_: _middle,
    aten.normal_: lambda _, mean=0.0, std=1.0: mean,
    aten.rrelu_with_noise: _middle_slopes,
    aten.rand: lambda *_: 0.5,
    aten.rand_like: lambda *_: 0.5,
    aten.randn: lambda *_: 0.0,
    aten.randn_like: lambda *_: 0.0,
    aten.randint: _middle_integer,
    aten.randint_like: _middle_integer,
}
"""For each op, the mean of what it draws, from its arguments; with it, dropout changes nothing.

Other ops are seeded with the same number before each call.
"""
