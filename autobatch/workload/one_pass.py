"""Iterators, of which each item can be read once, where a data set holds one.

Invariant: an iterator of the user's is not advanced. A twin is read in its place, and where it can
have none, reading it is refused before it has begun.
"""

from __future__ import annotations

import functools
import gc
import itertools
import operator
import os
import subprocess
import sys
import tempfile
import warnings
from ast import literal_eval
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import BuiltinFunctionType, GeneratorType, MethodWrapperType
from typing import Any

from autobatch.errors import SampleError

__all__ = [
    "Mark",
    "StandIns",
    "is_of_python",
    "kind_of",
    "mark_of",
    "parts_of",
]

_MOST_PARTS = 50_000
"""Values that are looked at for iterators."""

_HOLDERS = (tuple, functools.partial, MethodWrapperType, BuiltinFunctionType, Iterator)
"""Types of iterators, and of what is made anew where it holds one."""

_OF_PYTHON = ("builtins", "itertools", "_collections", "collections", "array")
"""Modules whose iterators have no attributes: nothing can be done with one but to read it."""


class StandIns:
    """What is read in the place of iterators: twins that give the same, or what refuses.

    Attributes:
        refusal: the error of the first iterator that was about to be read and has no twin.
    """

    def __init__(self, *, guarded: bool) -> None:
        self.refusal: SampleError | None = None
        self._guarded = guarded
        self._process = os.getpid()
        self._looked_at = 0
        self._kinds: dict[type, bool] = {}  # whether to look at values of a type
        self._made: dict[int, tuple[Any, Any]] = {}  # with the original, whose id stays its own

    def of(self, value: Any, name: str) -> Any:
        """Return what may be read in the place of a value: itself, where it is no iterator.

        Tuples, partial functions and methods that hold iterators are made anew.
        """
        if not self.may_replace(value) or self._looked_at > _MOST_PARTS:
            return value
        if id(value) in self._made:
            return self._made[id(value)][1]
        self._looked_at += len(value) if type(value) is tuple else 1
        made = self._new(value, name)
        if made is not value:
            self._made[id(value)] = value, made
        return made

    def may_replace(self, value: Any) -> bool:
        """Say whether a value is an iterator, or of a type that may hold one and is made anew."""
        kind = type(value)
        if kind not in self._kinds:
            self._kinds[kind] = issubclass(kind, _HOLDERS)
        return self._kinds[kind]

    def _new(self, value: Any, name: str) -> Any:
        if type(value) is tuple:
            parts = self._all(value, name)
            return value if _are(parts, value) else parts
        if type(value) is functools.partial:
            given = (value.func, *value.args, *value.keywords.values())
            function, *rest = parts = self._all(given, name)
            if _are(parts, given):
                return value
            positional = len(value.args)
            named = dict(zip(value.keywords, rest[positional:], strict=True))
            return functools.partial(function, *rest[:positional], **named)
        if isinstance(value, (MethodWrapperType, BuiltinFunctionType)):
            owner = self.of(value.__self__, name)
            return value if owner is value.__self__ else getattr(owner, value.__name__)
        if isinstance(value, GeneratorType):
            return self._guard(value, name)
        if not (isinstance(value, Iterator) and type(value).__module__ in _OF_PYTHON):
            return value
        try:
            with _deprecations_ignored():
                return self._twin(value, name)
        except Exception:  # from Python 3.14 on, most of itertools cannot be copied
            return self._guard(value, name)

    def _all(self, parts: tuple[Any, ...], name: str) -> tuple[Any, ...]:
        return tuple(self.of(part, name) for part in parts)

    def _twin(self, iterator: Any, name: str) -> Any:
        """Copy an iterator and those that it reads, which a plain copy would share with it."""
        if isinstance(iterator, itertools.count):
            return itertools.count(*literal_eval(f"({repr(iterator)[6:-1]},)"))
        if hasattr(iterator, "__copy__"):  # of itertools.tee, which remembers what a twin has read
            return iterator.__copy__()
        make, args, *state = iterator.__reduce__()
        twin = make(*self._all(args, name))
        if state and state[0] is not None:
            # itertools.cycle goes on filling the list that it has
            held = state[0] if isinstance(state[0], tuple) else (state[0],)
            parts = tuple(list(each) if type(each) is list else each for each in held)
            parts = self._all(parts, name)
            twin.__setstate__(parts if isinstance(state[0], tuple) else parts[0])
        return twin

    def _guard(self, iterator: Iterator[Any], name: str) -> Any:
        return self._refusing(iterator, name) if self._guarded else iterator

    def _refusing(self, iterator: Iterator[Any], name: str) -> Iterator[Any]:
        if os.getpid() == self._process:
            self.refuse(iterator, name)
        yield from iterator  # the copy of a loader's worker

    def refuse(self, iterator: Any, name: str) -> None:
        """Refuse to read an iterator.

        Raises:
            SampleError: always.
        """
        self.refusal = self.refusal or SampleError(
            f"{name} is a {kind_of(iterator)}, which would lose its items by being read: let the "
            "data set make a new one each time that it is read, or pass one batch"
        )
        raise self.refusal


def kind_of(value: Any) -> str:
    """Name the type of an iterator or file as its user knows it."""
    return type(value).__qualname__


def is_of_python(value: Any) -> bool:
    """Say whether an iterator of the standard library keeps where it is in its attributes.

    Those of csv, codecs and fileinput do, beside the file that they read.
    """
    module = type(value).__module__.partition(".")[0]
    return isinstance(value, Iterator) and module in sys.stdlib_module_names


def parts_of(value: Any) -> tuple[Any, ...]:
    """Return what an iterator or what stands for a file holds: functions, data, other ones."""
    if isinstance(value, subprocess.Popen):
        return (value.stdout, value.stderr)
    if isinstance(value, tempfile._TemporaryFileWrapper):
        return (value.file,)
    if type(value).__module__ == "_csv":
        return tuple(gc.get_referents(value))
    if isinstance(value, Iterator) and type(value).__module__ in _OF_PYTHON:
        if isinstance(value, GeneratorType) or hasattr(value, "__copy__"):
            return ()
        with suppress(Exception), _deprecations_ignored():
            return tuple(value.__reduce__()[1:])
    return ()


@dataclass(frozen=True, slots=True)
class Mark:
    """What changes where an iterator is read on, though not in every case.

    Attributes:
        held: the objects that it holds.
        numbers: the place in its code, and how many items are left in what it reads.
    """

    held: tuple[Any, ...]
    numbers: tuple[int, ...]

    def differs(self, other: Mark | None) -> bool:
        """Say whether the iterator was read on between two marks."""
        if other is None or len(self.held) != len(other.held):
            return True
        return self.numbers != other.numbers or not _are(self.held, other.held)


def mark_of(value: Any) -> Mark | None:
    """Return the mark of a generator or of a library's iterator; None of what has none."""
    if isinstance(value, GeneratorType):
        frame = value.gi_frame
        if frame is None:  # it has ended
            return Mark((), ())
        held = tuple(frame.f_locals.values())
        return Mark(held, (frame.f_lasti, *map(_left, held)))
    own = getattr(value, "__dict__", None) if isinstance(value, Iterator) else None
    return Mark(tuple(own.values()), ()) if isinstance(own, dict) and own else None


def _left(value: Any) -> int:
    """Return how many items an iterator of Python's has left, as far as it tells."""
    is_plain = isinstance(value, Iterator) and type(value).__module__ == "builtins"
    return operator.length_hint(value, -1) if is_plain else -1


@contextmanager
def _deprecations_ignored() -> Iterator[None]:
    """Let iterators of itertools be copied, which Python up to 3.13 does with a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _are(parts: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return all(map(operator.is_, parts, others))
