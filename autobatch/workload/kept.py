"""The state of a user's data set, transforms and collate function, put back after items were read.

Invariant: random generators are always put back, and so is all else that is small; large data is
neither copied nor looked through. Objects of libraries, which may stand for files or threads, are
gone through for what they hold of the user's and of generators, and are not written to.
"""

from __future__ import annotations

import functools
import random
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from autobatch.support.owners import is_own_class, is_own_function
from autobatch.workload.tree import is_array

__all__ = ["attributes_kept"]

_MOST_OBJECTS = 50_000
_MOST_ELEMENTS = 10_000
"""Of a container that is looked into; of a longer list or dict the length alone is kept."""

_MOST_BYTES = 2**20
_MOST_BYTES_IN_ALL = 2**26

_PLAIN = (int, float, complex, str, bytes, type(None), torch.device, torch.dtype, ModuleType)
_CONTAINERS = (list, dict, set, deque, bytearray, array)
_DATA = (Dataset, Sampler, DataLoader, nn.Module)
_OUTSIDE = frozenset(
    "_io _thread asyncio concurrent ctypes io logging mmap multiprocessing pyarrow queue socket "
    "sqlite3 subprocess tempfile threading".split()
)
"""Modules whose objects stand for something outside of Python."""


@contextmanager
def attributes_kept(*objects: Any) -> Iterator[None]:
    """Restore what items are read from, and what reading them draws from or counts in.

    A file that reading opened must not be inherited by forked workers, and a random generator must
    draw in training what it would have drawn.

    >>> log = [1]
    >>> with attributes_kept(log):
    ...     log.append(2)
    >>> log
    [1]
    """
    state = _State(objects)
    try:
        yield
    finally:
        for put_back in reversed(state.steps):
            with suppress(Exception):  # the others are put back where one cannot be written to
                put_back()


class _State:
    """How everything that objects reach is put back as it is now.

    Attributes:
        steps: what puts it back.
    """

    def __init__(self, objects: tuple[Any, ...]) -> None:
        self.steps: list[Callable[[], None]] = []
        self._bytes = 0
        self._seen: dict[int, bool] = {}
        self._alive: list[Any] = []  # keeps ids from being reused
        self._given = set(map(id, objects))
        # What is the user's own may be written to.
        self._waiting: deque[tuple[Any, bool]] = deque((each, True) for each in objects)
        while self._waiting and len(self._alive) < _MOST_OBJECTS:
            value, is_own = self._waiting.popleft()
            if isinstance(value, _PLAIN) or self._seen.get(id(value), -1) >= is_own:
                continue
            self._seen[id(value)] = is_own
            self._alive.append(value)
            with suppress(Exception):  # an object of any kind, whose parts cannot be asked for
                self._look(value, is_own)

    def _look(self, value: Any, is_own: bool) -> None:
        generator = _generator(value)
        if generator is not None:
            self.steps.append(generator)
        elif isinstance(value, Tensor) or is_array(value):
            if is_own:
                self._values(value)
        elif isinstance(value, _CONTAINERS):
            self._container(value, is_own)
        elif isinstance(value, (tuple, frozenset, MappingProxyType)):
            if len(value) <= _MOST_ELEMENTS:
                self._then(value, is_own)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, (MethodType, BuiltinFunctionType)):
            parts = (value.__self__, getattr(value, "__func__", None))
            self._then(parts, is_own)
        elif isinstance(value, functools.partial):
            self._then((value.func, value.args, value.keywords), is_own)
        elif isinstance(value, type):
            if is_own_class(value):
                self._class(value)
        else:
            self._object(value)

    def _then(self, parts: Any, is_own: bool) -> None:
        self._waiting.extend((part, is_own) for part in parts)

    def _values(self, value: Any) -> None:
        """Keep the values of a small tensor or array."""
        nbytes = int(value.nbytes)
        if nbytes > _MOST_BYTES or self._bytes + nbytes > _MOST_BYTES_IN_ALL:
            return
        self._bytes += nbytes
        if isinstance(value, Tensor):
            before = value.detach().clone()

            def put_back() -> None:
                if before.shape != value.shape:
                    value.data = before
                elif not torch.equal(before, value):
                    value.detach().copy_(before)

        elif getattr(getattr(value, "flags", None), "writeable", False):
            before = value.copy()

            def put_back() -> None:
                if value.tobytes() != before.tobytes():
                    value[...] = before

        else:
            return
        self.steps.append(put_back)

    def _container(self, value: Any, is_own: bool) -> None:
        length = len(value)
        if length > _MOST_ELEMENTS:
            if is_own and isinstance(value, (list, dict)):
                self.steps.append(functools.partial(_shorten, value, length))
            return
        if is_own:
            self.steps.append(functools.partial(_refill, value, _held(value)))
        if isinstance(value, dict):
            self._then(chain(value.keys(), value.values()), is_own)
        elif not isinstance(value, (bytearray, array)):
            self._then(value, is_own)

    def _function(self, function: FunctionType) -> None:
        """Look at what a function reads: its own variables, and those around it."""
        is_own = is_own_function(function)
        self._then((function.__defaults__, function.__kwdefaults__, function.__dict__), is_own)
        for cell in function.__closure__ or ():
            self._cell(cell, is_own)
        if not is_own:
            return
        found = function.__globals__
        for name in _names(function.__code__) & found.keys():
            if not (name.startswith("__") or isinstance(found[name], ModuleType)):
                self.steps.append(functools.partial(found.__setitem__, name, found[name]))
                self._then((found[name],), not _is_of_library(found[name]))

    def _cell(self, cell: CellType, is_own: bool) -> None:
        with suppress(ValueError):  # not filled yet
            held = cell.cell_contents
            if is_own:
                self.steps.append(lambda: setattr(cell, "cell_contents", held))
            self._then((held,), is_own)

    def _class(self, kind: type) -> None:
        self._then(kind.__bases__, True)
        for name, value in list(vars(kind).items()):
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, FunctionType):
                self._then((function,), True)
            elif not name.startswith("__") and not hasattr(type(value), "__get__"):
                self.steps.append(functools.partial(_reset, kind, name, value))
                self._then((value,), True)

    def _object(self, value: Any) -> None:
        kind = type(value)
        is_own = is_own_class(kind)
        if kind.__module__.partition(".")[0] in _OUTSIDE:
            return
        if is_own:
            self._then((kind,), True)
        # A data set is what is read, whoever wrote it.
        is_kept = is_own or isinstance(value, _DATA) or id(value) in self._given
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            if is_kept:
                self.steps.append(functools.partial(_refill, own, dict(own)))
            self._then(list(own.values()), is_kept)
        slots = {name for base in kind.__mro__ for name in _slots(base)} if is_own else ()
        for name in slots:
            with suppress(AttributeError):
                part = getattr(value, name)
                self.steps.append(functools.partial(object.__setattr__, value, name, part))
                self._then((part,), True)


def _generator(value: Any) -> Callable[[], None] | None:
    """Return what puts a random generator back; None for what is none."""
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, torch.Generator):
        return functools.partial(_set_state, value, value.get_state())
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.Generator):
        value = value.bit_generator
    if isinstance(value, numpy.random.BitGenerator):
        return functools.partial(setattr, value, "state", value.state)
    if isinstance(value, numpy.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    return None


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _held(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _refill(container: Any, held: Any) -> None:
    """Let a container hold what it held, in the same order."""
    now = _held(container)
    parts, parts_now = (
        [*chain.from_iterable(each.items())] if isinstance(each, dict) else each
        for each in (held, now)
    )
    if len(parts) == len(parts_now) and all(map(_is, parts, parts_now)):
        return
    if isinstance(container, bytearray):
        container[:] = bytes(held)
    elif isinstance(container, array):
        container[:] = array(container.typecode, held)
    else:
        container.clear()
        fill = container.update if isinstance(container, (dict, set)) else container.extend
        fill(held)


def _is(one: Any, other: Any) -> bool:
    return one is other


def _shorten(container: Any, length: int) -> None:
    """Take off a list or dict what was added at its end."""
    if isinstance(container, list):
        del container[length:]
    while len(container) > length:
        container.popitem()


def _reset(kind: type, name: str, value: Any) -> None:
    if vars(kind).get(name) is not value:
        setattr(kind, name, value)


def _names(code: CodeType) -> set[str]:
    """Return the names that code reads, and code in it."""
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_of_library(value: Any) -> bool:
    """Say whether a global is what a library made, and not only of a type that it has."""
    if isinstance(value, type):
        return not is_own_class(value)
    return isinstance(value, FunctionType) and not is_own_function(value)
