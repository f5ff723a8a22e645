"""How objects of Python's own kinds are copied: containers, and what holds others to call them.

Invariant: what holds itself, through others or not, is copied once.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from autobatch.devices.places import Place, elements_of, entries_of

__all__ = ["CONTAINERS", "MAKERS"]

_MOST_ELEMENTS = 10_000
"""Elements of a container from which on it is a table or a data set, and shared."""


class _Walk(Protocol):
    """What is needed of a `Walk`."""

    def copied(self, value: Any, *, is_bound: bool = False) -> Any: ...

    def remember(self, original: Any, duplicate: Any) -> None: ...

    def counterpart(self, original_id: int) -> Any: ...

    def copies_itself(self, value: Any) -> bool: ...

    def place(self, place: Place) -> Place: ...

    def others(self, names: dict[Any, Any]) -> dict[Any, Any]: ...


def _is_table(value: list[Any] | dict[Any, Any]) -> bool:
    """Whether a container is so long that it is shared; lists of parameters never are."""
    return len(value) > _MOST_ELEMENTS and not isinstance(next(iter(value)), nn.Parameter)


def _shared(walk: _Walk, value: Any, place: Place) -> Any:
    """Keep a table; what it holds is as before after a run."""
    walk.remember(value, value)
    walk.place(place)
    return value


def _list(walk: _Walk, value: list[Any]) -> list[Any]:
    if _is_table(value):
        return _shared(walk, value, elements_of(value))  # type: ignore[no-any-return]
    return _filled(walk, value, [])  # type: ignore[no-any-return]


def _deque(walk: _Walk, value: deque[Any]) -> deque[Any]:
    return _filled(walk, value, deque(maxlen=value.maxlen))  # type: ignore[no-any-return]


def _filled(walk: _Walk, value: Iterable[Any], duplicate: Any) -> Any:
    walk.remember(value, duplicate)
    duplicate.extend(walk.copied(item) for item in value)
    return duplicate


def _tuple(walk: _Walk, value: tuple[Any, ...]) -> tuple[Any, ...]:
    parts = tuple(walk.copied(item) for item in value)
    if all(part is item for part, item in zip(parts, value, strict=True)):
        parts = value
    known = walk.counterpart(id(value))  # a tuple may hold what holds it
    if known is not None:
        return known  # type: ignore[no-any-return]
    walk.remember(value, parts)
    return parts


def _dict(walk: _Walk, value: dict[Any, Any]) -> dict[Any, Any]:
    if _is_table(value):
        return _shared(walk, value, entries_of(value, in_order=True))  # type: ignore[no-any-return]
    duplicate = type(value)()
    if isinstance(value, defaultdict):
        duplicate.default_factory = walk.copied(value.default_factory)  # type: ignore[attr-defined]
    walk.remember(value, duplicate)
    for key, part in list(value.items()):
        duplicate[key if type(key) is str else _key(walk, key)] = walk.copied(part)
    return duplicate


def _set(walk: _Walk, value: Any) -> Any:
    duplicate = type(value)(_key(walk, item) for item in value)
    walk.remember(value, duplicate)
    return duplicate


def _key(walk: _Walk, key: Any) -> Any:
    """Return what takes a key's place; the `id` of a tensor becomes that of its counterpart."""
    if type(key) is int and isinstance(known := walk.counterpart(key), Tensor):
        return id(known)
    return walk.copied(key)


def _method(walk: _Walk, value: MethodType) -> MethodType:
    owner = walk.copied(value.__self__)
    function = walk.copied(value.__func__)
    return value if owner is value.__self__ else MethodType(function, owner)


def _partial(walk: _Walk, value: functools.partial[Any]) -> functools.partial[Any]:
    parts: Any = [walk.copied(part, is_bound=True) for part in (value.func, *value.args)]
    named = {name: walk.copied(part, is_bound=True) for name, part in value.keywords.items()}
    duplicate: functools.partial[Any] = functools.partial(parts[0], *parts[1:], **named)
    duplicate.__dict__.update(walk.others(value.__dict__))
    walk.remember(value, duplicate)
    return duplicate


def _reference(walk: _Walk, value: weakref.ref[Any]) -> weakref.ref[Any]:
    held = value()
    if walk.copies_itself(held):
        return value  # as `copy.deepcopy` does; what holds it puts itself there
    duplicate = value if held is None else weakref.ref(walk.copied(held))
    walk.remember(value, duplicate)
    return duplicate


def _cache(walk: _Walk, value: Any) -> Any:
    """Give the copy an empty cache, so that entries of originals and copies do not mix."""
    walk.copied(value.__wrapped__)
    duplicate = functools.lru_cache(**value.cache_parameters())(value.__wrapped__)
    walk.remember(value, duplicate)
    return duplicate


MAKERS: dict[type, Callable[[_Walk, Any], Any]] = {
    list: _list,
    tuple: _tuple,
    dict: _dict,
    OrderedDict: _dict,
    defaultdict: _dict,
    set: _set,
    frozenset: _set,
    deque: _deque,
    MethodType: _method,
    functools.partial: _partial,
    weakref.ref: _reference,
    functools._lru_cache_wrapper: _cache,
}
"""What copies an object, by its kind."""

CONTAINERS = frozenset((list, tuple, dict, OrderedDict, set))
"""The most frequent kinds, which nothing else is said of."""
