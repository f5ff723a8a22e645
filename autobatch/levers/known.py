"""All levers by name, in the order in which their options are applied."""

from __future__ import annotations

from collections.abc import Iterable

from autobatch.errors import UsageError
from autobatch.levers.checkpointing import CHECKPOINTING
from autobatch.levers.lever import Lever
from autobatch.levers.precision import PRECISION
from autobatch.support.wording import near

__all__ = ["LEVERS", "levers_named"]

LEVERS = {lever.name: lever for lever in (PRECISION, CHECKPOINTING)}
"""In this order: what changes modules comes before what wraps them, and before optimizers."""


def levers_named(names: Iterable[str]) -> list[Lever]:
    """Return levers by their names, in the order in which they are applied.

    Raises:
        UsageError: there is no lever of a name.

    >>> [lever.name for lever in levers_named(["checkpointing", "precision"])]
    ['precision', 'checkpointing']
    """
    wanted = set(names)
    for name in sorted(wanted - LEVERS.keys()):
        raise UsageError(
            f"there is no lever {name!r}{near(name, LEVERS)}; levers: {', '.join(LEVERS)}"
        )
    return [lever for name, lever in LEVERS.items() if name in wanted]
