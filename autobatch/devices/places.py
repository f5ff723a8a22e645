"""Places that code reads its objects from: other objects are put there while a run lasts.

A function keeps the objects that it uses in its closure, its defaults and the globals of its
module; a method also in attributes of its class. None of these can be copied with the function
that reads them, as the functions and methods that it calls read them too. So the copies are put
where the originals were, and the originals are put back.

Invariant: outside of the block every place binds the objects that it bound before, whatever the
run rebound, added or deleted there; inside of it, what the block before it left there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import CellType, FunctionType, TracebackType
from typing import Any

from autobatch.support.interrupts import uninterrupted
from autobatch.workload.files import file_kept

__all__ = [
    "FilePlace",
    "Place",
    "Stage",
    "attributes_of",
    "cell",
    "defaults_of",
    "elements_of",
    "entries_of",
]

_MISSING = object()


class Place:
    """Names, and the objects that they are bound to."""

    def __init__(
        self,
        read: Callable[[], Mapping[Any, Any]],
        bind: Callable[[Any, Any], object],
        remove: Callable[[Any], object],
        finish: Callable[[Mapping[Any, Any]], object] | None = None,
    ):
        """Describe how the bindings are read, made and removed, and what is done when all are back.

        `finish` is called with all that is bound again.
        """
        self._read = read
        self._bind = bind
        self._remove = remove
        self._finish = finish
        self._before: dict[Any, Any] = {}
        self._gone: set[Any] = set()
        self.others: dict[Any, Any] = {}

    def enter(self) -> None:
        """Bind the others, and remember what was bound."""
        self._before = dict(self._read())
        for name in self._gone & self._before.keys():
            self._remove(name)
        for name, value in self.others.items():
            self._bind(name, value)

    def leave(self) -> None:
        """Bind what was bound before, and remember the others."""
        now, before = dict(self._read()), self._before
        self.others = {
            name: value for name, value in now.items() if before.get(name, _MISSING) is not value
        }
        self._gone = before.keys() - now.keys()
        for name in now.keys() - before.keys():
            self._remove(name)
        for name, value in before.items():
            if now.get(name, _MISSING) is not value:
                self._bind(name, value)
        if self._finish is not None:
            self._finish(before)
        self._before = {}


class FilePlace(Place):
    """Where a file is read next. It is where it was before, whenever a run begins or has ended."""

    def __init__(self, file: io.IOBase):
        """Take charge of a file."""
        super().__init__(dict, lambda name, value: None, lambda name: None)
        self._file = file
        self._put_back: Callable[[], None] | None = None

    def enter(self) -> None:
        """Remember where the file is; a pipe does not tell."""
        with suppress(OSError):
            self._put_back = file_kept(self._file)

    def leave(self) -> None:
        """Put the file back to there."""
        if self._put_back is not None:
            self._put_back()
        self._put_back = None


class Stage:
    """Several places that change together; a stage may be entered again, also from inside."""

    def __init__(self, places: list[Place]):
        """Take charge of these places."""
        self._places = places
        self._depth = 0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            with uninterrupted():
                for place in self._places:
                    place.enter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if not self._depth:
            with uninterrupted():
                for place in reversed(self._places):
                    place.leave()


def entries_of(values: dict[Any, Any], *, in_order: bool = False) -> Place:
    """Return the entries of a dict, such as a module's globals or an object's attributes.

    `in_order` keeps the order of the entries too; the dict is emptied where that has changed.
    """

    def sort(before: Mapping[Any, Any]) -> None:
        if list(values) != list(before):
            values.clear()
            values.update(before)

    finish = sort if in_order else None
    return Place(lambda: values, values.__setitem__, values.__delitem__, finish)


def attributes_of(owner: type) -> Place:
    """Return the attributes of a class."""
    return Place(
        lambda: vars(owner),
        lambda name, value: type.__setattr__(owner, name, value),
        lambda name: type.__delattr__(owner, name),
    )


def cell(variable: CellType) -> Place:
    """Return a variable of a closure; one that is not filled yet has no binding."""

    def read() -> dict[str, Any]:
        try:
            return {"cell_contents": variable.cell_contents}
        except ValueError:
            return {}

    return Place(
        read,
        lambda name, value: setattr(variable, name, value),
        lambda name: delattr(variable, name),
    )


def defaults_of(function: FunctionType) -> Place:
    """Return the default arguments of a function."""
    names = ("__defaults__", "__kwdefaults__")
    return Place(
        lambda: {name: getattr(function, name) for name in names},
        lambda name, value: setattr(function, name, value),
        lambda name: setattr(function, name, None),
    )


def elements_of(values: Any) -> Place:
    """Return the elements of a list, as one binding."""
    return Place(
        lambda: {"elements": list(values)},
        lambda _, elements: values.__setitem__(slice(None), elements),
        lambda _: values.clear(),
    )
