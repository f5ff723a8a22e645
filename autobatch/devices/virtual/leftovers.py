"""Tensors of a simulation that are still held when it has ended.

What the walk reaches is the user's own again by then (`copies.py`). What is left was put where it
does not look: the cache of a library's function, say, or an object that C code made.

Invariant: no tensor without memory stays in the process unseen. It is taken out of caches, dicts
and lists, and that is said; where that is not possible, an error is raised.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

from autobatch.errors import WorkloadError
from autobatch.support.torch_private import FakeTensor

__all__ = ["leftovers_removed"]

_FURTHEST = 8
"""References between a holder from before the run and a tensor that are followed."""


def leftovers_removed(mode: weakref.ref[Any]) -> list[str]:
    """Remove what is left of a mode's tensors, and say from where.

    Call it when nothing else refers to the mode, with all objects from before the run frozen
    (`gc.freeze`), and only the run's own to look at.

    Raises:
        WorkloadError: something that cannot be put back holds some.
    """
    if mode() is None:  # each of its tensors refers to it
        return []
    gc.collect()
    if mode() is None:
        return []
    young = gc.get_objects()
    tensors = [each for each in young if type(each) is FakeTensor and each.fake_mode is mode()]
    if not tensors:
        return []
    gc.unfreeze()
    notes = []
    for holder, held in list(_holders(tensors, young)):
        where = _name(holder)
        if not _emptied(holder, held):
            raise WorkloadError(
                f"{where} holds tensors of the simulation, which have no memory, and cannot be put "
                "back: make it again before training, and do not let the step write to it"
            )
        notes.append(
            f"{where} kept tensors of the simulation, which have no memory; they were removed "
            "from it: what it held in their place before, make again"
        )
    return list(dict.fromkeys(notes))  # what has no name is said once


def _holders(tensors: list[Any], young: list[Any]) -> Iterator[tuple[Any, set[int]]]:
    """Yield what was there before the run and refers to its tensors, with the ids of those."""
    from_the_run = set(map(id, young))
    waiting: list[Any] = tensors
    seen = set(map(id, waiting))
    ours = {id(tensors), id(young)}
    for _ in range(_FURTHEST):
        found = []
        for holder in gc.get_referrers(*waiting):
            key = id(holder)
            if key in seen or key in ours or isinstance(holder, FrameType) or holder is waiting:
                continue
            # a dict is not tracked before it holds what is: how old it is cannot be told
            if key in from_the_run and not isinstance(holder, dict):
                found.append(holder)
            else:
                yield holder, seen
        seen |= set(map(id, found))
        waiting = found
        ours.add(id(waiting))
        if not waiting:
            return


def _emptied(holder: Any, held: set[int]) -> bool:
    """Take objects out of what holds them; return whether that is possible."""
    if isinstance(holder, functools._lru_cache_wrapper):
        holder.cache_clear()
    elif isinstance(holder, dict):
        for key in [k for k, part in holder.items() if id(part) in held or id(k) in held]:
            del holder[key]
    elif isinstance(holder, list):
        holder[:] = [part for part in holder if id(part) not in held]
    elif isinstance(holder, set):
        holder -= {part for part in holder if id(part) in held}
    else:
        return False
    return True


def _name(holder: Any) -> str:
    """Say which object something is."""
    for name, module in list(sys.modules.items()):
        attributes = getattr(module, "__dict__", {})
        if attributes is holder:
            return f"module {name}"
        for attribute, value in list(attributes.items()):
            if value is holder:
                return f"{name}.{attribute}"
    named = getattr(holder, "__qualname__", None)
    return f"{named or 'a ' + type(holder).__name__}"
