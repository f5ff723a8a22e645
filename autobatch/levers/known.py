"""All levers by name, in the order in which their options are applied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from autobatch.errors import UsageError
from autobatch.levers.allocator import ALLOCATOR
from autobatch.levers.attention import ATTENTION, ATTENTION_KERNEL
from autobatch.levers.checkpointing import CHECKPOINTING
from autobatch.levers.lever import Lever
from autobatch.levers.lora import LORA
from autobatch.levers.loss import LOSS
from autobatch.levers.memory_format import MEMORY_FORMAT
from autobatch.levers.offload import OFFLOAD
from autobatch.levers.optimizer import OPTIMIZER
from autobatch.levers.precision import PRECISION
from autobatch.levers.sharding import SHARDING
from autobatch.support.wording import near

__all__ = ["LEVERS", "levers_named"]

LEVERS = {
    lever.name: lever
    for lever in (
        PRECISION,
        ATTENTION,
        ATTENTION_KERNEL,
        MEMORY_FORMAT,
        LOSS,
        LORA,
        CHECKPOINTING,
        OFFLOAD,
        SHARDING,
        OPTIMIZER,
        ALLOCATOR,
    )
}
"""In this order: what changes modules comes before what wraps them, and before optimizers."""


def levers_named(names: str | Lever | Iterable[str | Lever]) -> list[Lever]:
    """Return levers by their names, or the one of a name, in the order in which they are applied.

    Levers of the user's own are taken as they are, and come last; one that has the name of a lever
    that is known takes its place.

    Raises:
        UsageError: there is no lever of a name.

    >>> [lever.name for lever in levers_named(["checkpointing", "precision"])]
    ['precision', 'checkpointing']
    """
    given: list[Any] = [names]
    if isinstance(names, Iterable) and not isinstance(names, str):
        given = list(names)
    own = {lever.name: lever for lever in given if isinstance(lever, Lever)}
    wanted = {name for name in given if isinstance(name, str)}
    for name in given:
        if not isinstance(name, Lever) and (not isinstance(name, str) or name not in LEVERS):
            raise UsageError(
                f"there is no lever {name!r}{near(str(name), LEVERS)}; levers: {', '.join(LEVERS)}"
            )
    found = [own.pop(name, lever) for name, lever in LEVERS.items() if name in wanted | own.keys()]
    return [*found, *own.values()]
