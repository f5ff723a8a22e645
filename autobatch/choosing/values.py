"""Numbers that are given, such as the values of a parameter; no torch is needed to refuse them."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

from autobatch.errors import UsageError
from autobatch.support.wording import for_reader

__all__ = ["shown", "whole_values"]

_LONG = 60


def shown(value: object) -> str:
    """Write what was given in place of a number, in one short line.

    >>> shown(10**400), shown("0.3")
    ('an int', "'0.3'")
    """
    try:
        text = repr(value)
    except Exception:  # Python writes no number of more than 4,300 digits
        text = ""
    kind = type(value).__name__
    return text if text and len(text) <= _LONG else f"a{'n' * (kind[0] in 'aeiou')} {kind}"


def whole_values(values: Iterable[Any]) -> tuple[int, ...]:
    """Return the values, the smallest first.

    Raises:
        UsageError: there is none, one is given twice, or one is no positive whole number.
    """
    if not isinstance(values, Iterable):
        raise UsageError(f"values is {shown(values)}: use a list of whole numbers")
    found: list[int] = []
    for given in values:
        is_whole = isinstance(given, Integral) and not isinstance(given, bool)
        if not is_whole or given < 1:
            raise UsageError(f"a value is {shown(given)}: use whole numbers of at least 1")
        value = int(given)
        if value in found:
            raise UsageError(f"the value {value} is given twice: give each once")
        found.append(value)
    if not found:
        raise UsageError(
            "there are no values to vary: use " + for_reader("[512, 1024]", "--vary seq=512,1024")
        )
    return tuple(sorted(found))
