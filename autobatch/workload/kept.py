"""The state of a user's data set, transforms and collate function, put back after items were read.

Invariant: random generators are always put back, and so is all else that is small; large data is
neither copied nor looked through. Objects of libraries, which may stand for files or threads, are
gone through for what they hold of the user's and of generators, and are not written to. Files are
put back to where they were by `files`, and iterators are not advanced, which `one_pass` sees to.
"""

from __future__ import annotations

import functools
import queue
import random
import socket
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, repeat
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from autobatch.support.owners import is_own_class, is_own_function
from autobatch.support.wording import count
from autobatch.workload.files import file_kept, is_closed, is_file, wrapped
from autobatch.workload.one_pass import Mark, StandIns, is_of_python, kind_of, mark_of, parts_of
from autobatch.workload.tree import is_array

__all__ = ["Kept", "attributes_kept"]

_MOST_OBJECTS = 50_000
_MOST_ELEMENTS = 10_000
"""Of a container that is looked into; of a longer list or dict the length alone is kept."""

_MOST_BYTES = 2**20
_MOST_BYTES_IN_ALL = 2**26

_ANEW = "it cannot be put back, so let training begin with a new one"

_PLAIN = (int, float, complex, str, bytes, type(None), torch.device, torch.dtype, ModuleType)
_CONTAINERS = (list, dict, set, deque, bytearray, array)
_DATA = (Dataset, Sampler, DataLoader, nn.Module)
_OUTSIDE = frozenset(
    "_io _thread asyncio concurrent ctypes io logging mmap multiprocessing pyarrow queue socket "
    "sqlite3 subprocess tempfile threading".split()
)
"""Modules whose objects stand for something outside of Python."""


@contextmanager
def attributes_kept(*objects: Any, guarded: bool = True) -> Iterator[Kept]:
    """Restore what items are read from, and what reading them draws from or counts in.

    A file that reading opened must not be inherited by forked workers, and a random generator must
    draw in training what it would have drawn.

    Args:
        objects: what items are read from.
        guarded: whether to refuse that an iterator is read which cannot be put back.

    Raises:
        SampleError: one of these was about to be read; it is as it was.

    >>> log = [1]
    >>> with attributes_kept(log):
    ...     log.append(2)
    >>> log
    [1]
    """
    kept = Kept(objects, guarded=guarded)
    try:
        kept.stand_in()
        yield kept
    except Exception as error:
        refusal = kept.stand_ins.refusal
        if refusal is None or refusal is error:
            raise
        raise refusal from error
    finally:
        kept.put_back()
    if kept.stand_ins.refusal is not None:  # what was read caught it
        raise kept.stand_ins.refusal


class Kept:
    """How everything that objects reach is put back as it is now.

    Attributes:
        steps: what puts it back.
        stand_ins: what is read in the place of iterators.
        items: how many items were read, as who reads them counts.
        lost: what was read on and could not be put back, in one sentence each.
    """

    def __init__(self, objects: tuple[Any, ...], *, guarded: bool) -> None:
        self.steps: list[Callable[[], None]] = []
        self.stand_ins = StandIns(guarded=guarded)
        self.items = 0
        self.lost: list[str] = []
        self._bytes = 0
        self._seen: dict[int, bool] = {}
        self._alive: list[Any] = []  # keeps ids from being reused
        self._given = set(map(id, objects))
        self._names: dict[int, str] = {}  # of iterators, by id
        self._swaps: list[Callable[[], None]] = []
        self._files: dict[int, tuple[Any, str]] = {}
        self._marks: list[tuple[Any, str, Mark]] = []
        self._untold: list[tuple[Any, str]] = []  # pipes and others whose place is not known
        self._name = "the data set"
        # What is the user's own may be written to.
        self._waiting: deque[tuple[Any, bool, str]] = deque(
            (each, True, self._name) for each in objects
        )
        while self._waiting and len(self._alive) < _MOST_OBJECTS:
            value, is_own, self._name = self._waiting.popleft()
            if isinstance(value, _PLAIN) or self._seen.get(id(value), -1) >= is_own:
                continue
            self._seen[id(value)] = is_own
            self._alive.append(value)
            if isinstance(value, Iterator):
                self._names[id(value)] = self._name
            with suppress(Exception):  # an object of any kind, whose parts cannot be asked for
                self._look(value, is_own)
        self._keep_files()

    def stand_in(self) -> None:
        """Let twins be read in the place of iterators."""
        for swap in self._swaps:
            with suppress(Exception):
                swap()

    def put_back(self) -> None:
        """Put everything back, and note what cannot be."""
        for put_back in reversed(self.steps):
            with suppress(Exception):  # the others are put back where one cannot be written to
                put_back()
        self.lost = list(dict.fromkeys(self._losses()))

    def _losses(self) -> Iterator[str]:
        items = count(self.items, "item")
        read = f"when {items} {'was' if self.items == 1 else 'were'} read"
        for value, name, mark in self._marks:
            if mark.differs(mark_of(value)):
                yield f"{name} ({kind_of(value)}) was read on {read}: {_ANEW}"
        for file, name in self._files.values():
            if is_closed(file):
                yield f"{name} ({kind_of(file)}) was closed {read}: {_ANEW}"
        for value, name in self._untold:
            yield f"{name} ({kind_of(value)}) may have been read on {read}: {_ANEW}"

    def require_new(self, iterator: Any) -> None:
        """Refuse an iterator, as a library's, that was there before and cannot be put back.

        Raises:
            SampleError: it is one.
        """
        name = self._names.get(id(iterator))
        is_put_back = is_own_class(type(iterator)) or is_of_python(iterator)
        is_known = is_put_back or id(iterator) in self._files or id(iterator) in self._given
        if name is not None and not is_known:
            self.stand_ins.refuse(iterator, name)

    def _keep_files(self) -> None:
        """Keep the places of files, but for those that other files put where they need them."""
        for file, _ in list(self._files.values()):
            for inner in wrapped(file):
                self._files.pop(id(inner), None)
        for key, (file, name) in list(self._files.items()):
            try:
                step = file_kept(file)
            except Exception:
                step = None
                self._untold.append((file, name))
            if step is None:
                del self._files[key]
            else:
                self.steps.append(step)

    def _hold(self, value: Any, write: Callable[[Any], None]) -> None:
        """Let a twin of an iterator be where it is held, by a function that writes there."""
        with suppress(RecursionError):
            twin = self.stand_ins.of(value, self._name)
            if twin is not value:
                self._swaps.append(functools.partial(write, twin))

    def _look(self, value: Any, is_own: bool) -> None:
        generator = _generator(value)
        if generator is not None:
            self.steps.append(generator)
        elif isinstance(value, Tensor) or is_array(value):
            if is_own:
                self._values(value)
        elif isinstance(value, _CONTAINERS):
            self._container(value, is_own)
        elif is_file(value) and not is_own_class(type(value)):
            if is_own:  # a library's object may rely on where it put its own
                self._files[id(value)] = value, self._name
        elif isinstance(value, (tuple, frozenset, MappingProxyType)):
            if len(value) <= _MOST_ELEMENTS:
                self._then(value, is_own)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, (MethodType, MethodWrapperType, BuiltinFunctionType)):
            parts = (value.__self__, getattr(value, "__func__", None))
            self._then(parts, is_own)
        elif isinstance(value, functools.partial):
            self._then((value.func, value.args, value.keywords), is_own)
        elif isinstance(value, type):
            if is_own_class(value):
                self._class(value)
        else:
            self._object(value, is_own)

    def _then(self, parts: Any, is_own: bool, names: Iterable[str] | None = None) -> None:
        named = zip(parts, names or repeat(self._name), strict=False)
        self._waiting.extend((part, is_own, name) for part, name in named)

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
            if isinstance(value, (dict, list, deque)):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, part in items:
                    if self.stand_ins.may_replace(part):  # of thousands, few are iterators
                        self._hold(part, functools.partial(value.__setitem__, key))
        if isinstance(value, dict):
            self._then(chain(value.keys(), value.values()), is_own)
        elif not isinstance(value, (bytearray, array)):
            self._then(value, is_own)

    def _function(self, function: FunctionType) -> None:
        """Look at what a function reads: its own variables, and those around it."""
        is_own = is_own_function(function)
        self._then((function.__defaults__, function.__kwdefaults__, function.__dict__), is_own)
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            self._name = name
            self._cell(cell, is_own)
        if not is_own:
            return
        found = function.__globals__
        for name in _names(function.__code__) & found.keys():
            if not (name.startswith("__") or isinstance(found[name], ModuleType)):
                self._name = name
                write = functools.partial(found.__setitem__, name)
                self.steps.append(functools.partial(write, found[name]))
                self._hold(found[name], write)
                self._then((found[name],), not _is_of_library(found[name]))

    def _cell(self, cell: CellType, is_own: bool) -> None:
        with suppress(ValueError):  # not filled yet
            held = cell.cell_contents
            if is_own:
                write = functools.partial(setattr, cell, "cell_contents")
                self.steps.append(functools.partial(write, held))
                self._hold(held, write)
            self._then((held,), is_own)

    def _class(self, kind: type) -> None:
        self._then(kind.__bases__, True)
        for name, value in list(vars(kind).items()):
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, FunctionType):
                self._then((function,), True)
            elif not name.startswith("__") and not hasattr(type(value), "__get__"):
                self._name = f"{kind.__name__}.{name}"
                self.steps.append(functools.partial(_reset, kind, name, value))
                self._hold(value, functools.partial(setattr, kind, name))
                self._then((value,), True)

    def _object(self, value: Any, is_own: bool) -> None:
        kind = type(value)
        is_own_kind = is_own_class(kind)
        self._then(parts_of(value), is_own)
        if isinstance(value, queue.Queue):
            self._queue(value, is_own)
        if isinstance(value, socket.socket) and is_own:
            self._untold.append((value, self._name))
        if kind.__module__.partition(".")[0] in _OUTSIDE:
            return
        if is_own_kind:
            self._then((kind,), True)
        # A data set is what is read, whoever wrote it; and so is a reader of Python's.
        is_read = isinstance(value, _DATA) or (is_own and is_of_python(value))
        is_kept = is_own_kind or is_read or id(value) in self._given
        mark = None if is_kept else mark_of(value)
        if mark is not None:
            self._marks.append((value, self._name, mark))
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self._attributes(own, kind.__name__, is_kept)
        slots = {name for base in kind.__mro__ for name in _slots(base)} if is_own_kind else ()
        for name in slots:
            with suppress(AttributeError):
                part = getattr(value, name)
                self._name = f"{kind.__name__}.{name}"
                write = functools.partial(object.__setattr__, value, name)
                self.steps.append(functools.partial(write, part))
                self._hold(part, write)
                self._then((part,), True)

    def _attributes(self, own: dict[str, Any], kind: str, is_kept: bool) -> None:
        names = [f"{kind}.{name}" for name in own]
        if is_kept:
            self.steps.append(functools.partial(_refill, own, dict(own)))
            for name, part in own.items():
                self._name = f"{kind}.{name}"
                self._hold(part, functools.partial(own.__setitem__, name))
        self._then(list(own.values()), is_kept, names)

    def _queue(self, value: queue.Queue[Any], is_own: bool) -> None:
        """Keep what is in a queue, unless another thread waits at it, whose work it is."""
        with value.mutex:
            is_idle = not _waited_at(value)
            self._container(value.queue, is_own and is_idle)
        if is_own and is_idle:
            self.steps.append(
                functools.partial(setattr, value, "unfinished_tasks", value.unfinished_tasks)
            )


def _waited_at(value: queue.Queue[Any]) -> bool:
    return bool(value.not_empty._waiters or value.not_full._waiters)  # type: ignore[attr-defined]


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
