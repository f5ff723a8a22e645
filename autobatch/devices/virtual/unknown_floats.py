"""Floats that were read from a simulated GPU, where they are not known.

Code that only logs such a number needs nothing of it; code that compares it takes a branch.

Invariant: in arithmetic, in text and as an argument it is the number that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["UnknownFloat"]

_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_ARITHMETIC = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
    *("radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow", "neg", "abs"),
)


class UnknownFloat(float):
    """A float that tells when code compares it, or what was computed of it."""

    __slots__ = ("_compared",)
    _compared: Callable[[], None]
    __hash__ = float.__hash__

    @classmethod
    def made(cls, value: float, compared: Callable[[], None]) -> UnknownFloat:
        """Return the float; `compared` is called when code compares it.

        >>> told = []
        >>> number = UnknownFloat.made(0.5, lambda: told.append("compared"))
        >>> f"{number:.1f}", told, 2 * number > 3, told
        ('0.5', ['compared'], False, ['compared'])
        """
        made = cls(value)
        made._compared = compared
        return made

    def __bool__(self) -> bool:
        """Return whether it is not zero: that is a branch, too."""
        self._compared()
        return float.__bool__(self)

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        """Be a plain float wherever it is copied to or stored."""
        return float, (float(self),)


def _comparison(name: str) -> Callable[[UnknownFloat, Any], Any]:
    plain = getattr(float, name)

    def compare(number: UnknownFloat, other: Any) -> Any:
        number._compared()
        return plain(number, other)

    return compare


def _computed(name: str) -> Callable[..., Any]:
    plain = getattr(float, name)

    def compute(number: UnknownFloat, *others: Any) -> Any:
        result = plain(number, *others)
        return UnknownFloat.made(result, number._compared) if type(result) is float else result

    return compute


for _name in _COMPARISONS:
    setattr(UnknownFloat, f"__{_name}__", _comparison(f"__{_name}__"))
for _name in _ARITHMETIC:
    setattr(UnknownFloat, f"__{_name}__", _computed(f"__{_name}__"))
