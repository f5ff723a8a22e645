"""The values that a parameter takes; no torch is needed to refuse them."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

from autobatch.errors import UsageError
from autobatch.support.wording import for_reader

__all__ = ["whole_values"]


def whole_values(values: Iterable[Any]) -> tuple[int, ...]:
    """Return the values, the smallest first.

    Raises:
        UsageError: there is none, one is given twice, or one is no positive whole number.
    """
    found: list[int] = []
    for given in values:
        is_whole = isinstance(given, Integral) and not isinstance(given, bool)
        if not is_whole or given < 1:
            raise UsageError(f"a value is {given!r}: use whole numbers of at least 1")
        value = int(given)
        if value in found:
            raise UsageError(f"the value {value} is given twice: give each once")
        found.append(value)
    if not found:
        raise UsageError(
            "there are no values to vary: use " + for_reader("[512, 1024]", "--vary seq=512,1024")
        )
    return tuple(sorted(found))
