"""What functions and objects of the user's own are, in plain text that other processes find alike.

A study goes on only where levers, model and loss do what they did when it was begun. So code is
compared, with the values that it was made with or reads, and what those hold in turn.

Invariant: what a process draws anew is no part of it: addresses, ids, seeds, the order of sets, and
the values of tensors.
"""

from __future__ import annotations

import argparse
import dis
import functools
import hashlib
import inspect
import io
import logging
import re
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.support.owners import is_own_class, is_own_function, is_own_module

__all__ = ["CODE", "identity_of"]

CODE = " (code)"
"""How the names of parts end that are code."""

_MOST_PARTS = 2_000
_FEW = 100
"""Entries of a container that is looked into: what has more is data."""

_LARGE = 2**40
"""Whole numbers from here on are ids, addresses and seeds: no setting is as large."""

_LONG = 80
"""Characters of a text that is kept; of longer ones, a hash is."""

_ADDRESS = re.compile(r"0x[0-9a-f]{6,}", re.IGNORECASE)

_BAGS = (argparse.Namespace, types.SimpleNamespace)
"""Objects of Python's that hold whatever a program puts there."""

_BY_NAME = frozenset(("__dict__", "asdict", "astuple", "attrgetter", "getattr", "vars"))
"""With what code reads attributes that it does not name."""

_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")

_BY_TYPE = (logging.Logger, io.IOBase, types.GeneratorType, torch.Generator)
"""What has a state of the process alone."""


def identity_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return what values of the user's own are, part by part, by name.

    Args:
        values: functions, classes, objects or plain values, by what they are called; the names of
            their parts begin so.

    >>> identity_of({"clip": functools.partial(round, ndigits=2)})
    {'clip.ndigits': '2', 'clip': 'builtins.round'}
    """
    return _Walk(values).parts


@dataclass(frozen=True, slots=True)
class _Place:
    """A value, and where it was found.

    Attributes:
        path: how its part is called.
        value: found there.
        names: that the code which reads it loads, where code does.
        attribute: of an object that only code reads; None where it counts anyway.
    """

    path: str
    value: Any
    names: frozenset[str] = frozenset()
    attribute: str | None = None


class _Walk:
    """Goes through what values are made of, each object once, the nearest first."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.parts: dict[str, str] = {}
        self._paths: dict[int, str] = {}
        self._kept: list[Any] = []  # so that no id is another object's
        self._loaded: set[str] = set()
        self._unread: list[_Place] = []
        self._waiting = deque(_Place(name, value) for name, value in values.items())
        while self._waiting and len(self.parts) < _MOST_PARTS:
            self._visit(self._waiting.popleft())
            if not self._waiting:  # attributes that code found meanwhile reads
                read = [each for each in self._unread if self._is_read(each)]
                self._unread = [each for each in self._unread if not self._is_read(each)]
                self._waiting.extend(read)

    def _is_read(self, place: _Place) -> bool:
        return place.attribute in self._loaded or not _BY_NAME.isdisjoint(self._loaded)

    def _visit(self, place: _Place) -> None:
        path, value = place.path, place.value
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Enum)):
            self.parts[path] = _text(value)
            return
        if (known := self._paths.get(id(value))) is not None:
            self.parts[path] = f"as {known}"
            return
        self._paths[id(value)] = path
        self._kept.append(value)
        try:
            held = [*self._held(place)]
        except Exception:  # of the user's own: what it is made of cannot be told
            self.parts[path] = _named(type(value))
            return
        for each in held:
            waits = each.attribute is not None and not self._is_read(each)
            (self._unread if waits else self._waiting).append(each)

    def _held(self, place: _Place) -> Iterator[_Place]:
        """Write what a value is, and yield what it holds."""
        path, value, kind = place.path, place.value, type(place.value)
        if isinstance(value, functools.partial):
            for name, each in (*enumerate(value.args), *value.keywords.items()):
                yield _Place(f"{path}.{name}", each)
            yield _Place(path, value.func)
        elif isinstance(value, types.MethodType):
            yield _Place(path, value.__func__)
            yield _Place(f"{path}.self", value.__self__)
        elif isinstance(value, FunctionType):
            yield from self._function(path, value)
        elif isinstance(value, property):
            for each in (value.fget, value.fset):
                yield _Place(path, each)
        elif isinstance(value, (staticmethod, classmethod)) or hasattr(value, "cache_parameters"):
            yield _Place(path, value.__wrapped__)
        elif isinstance(value, types.BuiltinFunctionType):
            self.parts[path] = f"{value.__module__}.{value.__qualname__}"
        elif isinstance(value, type):
            yield from self._class(path, value)
        elif isinstance(value, (Mapping, list, tuple, set, frozenset)):
            self.parts[path] = f"{_named(kind)} of {len(value)}"
            if len(value) <= _FEW:
                for name, each in _entries(value):
                    yield _Place(f"{path}[{name}]", each)
        elif isinstance(value, ModuleType):
            self.parts[path] = value.__name__
            if is_own_module(value):
                for name in sorted(place.names & vars(value).keys()):
                    yield _Place(f"{path}.{name}", vars(value)[name])
        elif isinstance(value, Tensor) or hasattr(value, "__array__"):
            layout = getattr(value, "dtype", ""), tuple(getattr(value, "shape", ()))
            self.parts[path] = f"{_named(kind)} {layout[0]} {layout[1]}"
        elif isinstance(value, nn.Module):
            shapes = [(name, each.dtype, each.shape) for name, each in value.named_parameters()]
            self.parts[path] = f"{_named(kind)} {_text(f'{value!r} {shapes}')}"
            for each in dict.fromkeys(map(type, value.modules())):
                yield _Place(f"{path}: {_named(each)}", each)
        else:
            yield from self._object(path, value)

    def _function(self, path: str, function: FunctionType) -> Iterator[_Place]:
        """Write a function's name and code, and yield what it was made with and what it reads."""
        code = function.__code__
        self.parts[path] = f"{function.__module__}.{function.__qualname__}"
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        held = {f".{name}": cell.cell_contents for name, cell in cells if cell != CellType()}
        held |= {f".{name}": each for name, each in (function.__kwdefaults__ or {}).items()}
        held |= {f" default {at}": each for at, each in enumerate(function.__defaults__ or ())}
        names: set[str] = set()
        if is_own_function(function):
            self.parts[path + CODE] = _hash(_told(code, function.__doc__))
            for each in _nested(code):
                for step in dis.get_instructions(each):
                    if step.opname.startswith("LOAD_") and isinstance(step.argval, str):
                        names.add(step.argval)
                        if step.opname in _GLOBALS and step.argval in function.__globals__:
                            held[f": {step.argval}"] = function.__globals__[step.argval]
            self._loaded |= names
        for name, value in held.items():
            yield _Place(f"{path}{name}", value, frozenset(names))

    def _class(self, path: str, kind: type) -> Iterator[_Place]:
        """Write a class's name, and yield what one of the user's own defines."""
        self.parts[path] = _named(kind)
        if not _is_users_class(kind):
            return
        for name, each in vars(kind).items():
            is_made = name.startswith("__") and is_dataclass(kind) and _file_of(each) == "<string>"
            is_code = isinstance(each, (FunctionType, staticmethod, classmethod, property))
            is_value = not (name.startswith("__") or hasattr(each, "__get__"))
            if (is_code and not is_made) or is_value:
                yield _Place(f"{path}.{name}", each)
        for at, base in enumerate(kind.__bases__):
            yield _Place(f"{path} base {at}", base)

    def _object(self, path: str, value: Any) -> Iterator[_Place]:
        """Write what an object is, and yield its class and its attributes.

        Those of an object of the user's own count where code reads them.
        """
        kind: Any = type(value)
        slots = [name for each in kind.__mro__ for name in _slots_of(each) if hasattr(value, name)]
        had = {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots}}
        if isinstance(value, torch.optim.Optimizer):
            self.parts[path] = f"{_named(kind)} {_text(repr(value))}"
        elif isinstance(value, _BY_TYPE) or had:
            self.parts[path] = _named(kind)
            is_read = _is_users_class(kind) or isinstance(value, _BAGS)
            for name, each in () if isinstance(value, _BY_TYPE) else had.items():
                yield _Place(f"{path}.{name}", each, attribute=name if is_read else None)
        else:
            is_told = kind.__repr__ is not object.__repr__
            self.parts[path] = _text(repr(value)) if is_told else _named(kind)
        yield _Place(f"{path} (class)", kind)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a container holds, by key or place."""
    if isinstance(value, Mapping):
        for place, (key, each) in enumerate(value.items()):
            is_plain = isinstance(key, (bool, int, float, str, type(None)))
            yield _text(repr(key)) if is_plain else str(place), each
    else:
        is_set = isinstance(value, (set, frozenset))
        ordered = sorted(value, key=lambda each: _text(repr(each))) if is_set else value
        yield from ((str(place), each) for place, each in enumerate(ordered))


def _slots_of(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    return [slots] if isinstance(slots, str) else [n for n in slots if not n.startswith("__")]


def _file_of(value: Any) -> str:
    """Return the file of a function's code; below what wraps it, where something does."""
    value = inspect.unwrap(value) if callable(value) else getattr(value, "__func__", value)
    return value.__code__.co_filename if isinstance(value, FunctionType) else ""


def _is_users_class(kind: type) -> bool:
    """Whether a class is defined in the user's own code, which may be in no module."""
    return kind.__module__ not in sys.modules or is_own_class(kind)


def _named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _text(value: Any) -> str:
    """Write a plain value, without what a process draws anew."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _LARGE:
        return "a large number"
    text = _ADDRESS.sub("0x…", value if isinstance(value, str) else repr(value))
    return text if len(text) <= _LONG else _hash(text)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Yield code, and that of the functions in it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _nested(each)


def _told(code: CodeType, docstring: str | None = None) -> str:
    """Write code without the lines where it stands, and without a docstring."""
    constants = [
        _told(each) if isinstance(each, CodeType) else _constant(each)
        for place, each in enumerate(code.co_consts)
        if place or docstring is None or each != docstring
    ]
    about = code.co_varnames, code.co_freevars, code.co_cellvars, code.co_names, code.co_flags
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    jumps = getattr(code, "co_exceptiontable", b"")
    return repr((code.co_code, constants, about, counts, jumps))


def _constant(value: object) -> str:
    if isinstance(value, frozenset):
        return repr(sorted(map(_constant, value)))
    if isinstance(value, tuple):
        return repr([*map(_constant, value)])
    return repr(value)
