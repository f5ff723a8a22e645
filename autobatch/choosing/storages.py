"""Where studies are kept: what a storage is called, how it is opened, and how its errors read.

Invariant: whatever a storage raises becomes one line that says what to try.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import SQLAlchemyError

from autobatch.errors import AutobatchError, FileError, UsageError
from autobatch.support.wording import for_reader, listed, one_line
from autobatch.workload.identity import CODE

__all__ = [
    "BaseStorage",
    "anew",
    "differences",
    "opening",
    "reaching",
    "storage_named",
    "storage_of",
]

_LOCK_S = 60.0
"""Seconds that a worker waits while others write to a SQLite file."""

_OPENINGS, _OPENING_S = 20, 0.25
_HALF_MADE = ("already exists", "no such table", "UNIQUE constraint", "database is locked")
"""What SQLite says where another process is just making the same tables."""

_TOLD = 4
"""So many differences between two questions are named."""

_FORMS = "name one such as sqlite:///sweep.db, or the path of a journal file such as sweep.journal"


def storage_of(storage: str | os.PathLike[str] | BaseStorage | None) -> BaseStorage:
    """Return the storage of Optuna that is named: by a URL, a path, or itself; None is memory."""
    if storage is None:
        return optuna.storages.InMemoryStorage()
    if isinstance(storage, BaseStorage):
        return storage
    text = os.fspath(storage)
    if "://" not in text:
        backend = JournalFileBackend(text)
        return optuna.storages.JournalStorage(backend)
    is_sqlite = text.startswith("sqlite")
    options = {"connect_args": {"timeout": _LOCK_S}} if is_sqlite else {}
    for left in reversed(range(_OPENINGS)):
        try:
            return optuna.storages.RDBStorage(text, engine_kwargs=options)
        except Exception as error:  # noqa: PERF203 — one worker finds what another half made
            if not left or not any(said in _said(error) for said in _HALF_MADE):
                raise
            time.sleep(_OPENING_S)
    raise AssertionError


def storage_named(storage: str | os.PathLike[str] | BaseStorage) -> str:
    """Return what messages call a storage.

    Raises:
        UsageError: it is none.
    """
    if isinstance(storage, BaseStorage):
        return f"the {type(storage).__name__}"
    if not isinstance(storage, (str, os.PathLike)) or not os.fspath(storage):
        raise UsageError(f"storage is {storage!r}: {_FORMS}")
    return repr(os.fspath(storage))


@contextlib.contextmanager
def opening(where: str | None) -> Iterator[None]:
    """Say of whatever fails in the block that a storage cannot be opened."""
    try:
        yield
    except AutobatchError:
        raise
    except Exception as error:  # SQLAlchemy's, Optuna's, and of files that are no journals
        raise FileError(f"cannot open the storage {where}: {_said(error)}; {_FORMS}") from error


@contextlib.contextmanager
def reaching(where: str | None) -> Iterator[None]:
    """Say of a storage that was open, and fails in the block, that it cannot be reached."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError, OSError) as error:
        raise FileError(
            f"the storage {where} cannot be read or written any more: {_said(error)}; what had "
            "finished is kept, and the same sweep goes on from there"
        ) from error


def anew(where: str | None) -> str:
    """Say how to begin another study than the one that is there."""
    other = for_reader("study='another name'", "--study NAME")
    storage = for_reader("storage", "--storage")
    return f"begin anew with {other} or another {storage}; nothing in {where} was changed"


def differences(known: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Say in what two questions differ, with the values where they are short.

    >>> differences({"target": 64, "gpu": "t4"}, {"target": 32, "gpu": "t4"})
    'target: 64 there, 32 here'
    """
    return listed([*_differences(known, asked)], _TOLD)


def _differences(known: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*known, *asked]):
        was, now = known.get(name), asked.get(name)
        if was == now:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from (f"{name}: {each}" for each in _differences(was, now))
            continue
        pair = f"{name}: {was!r} there, {now!r} here"
        yield pair if len(pair) < 120 and not name.endswith(CODE) else name


def _said(error: Exception) -> str:
    """Return what lies behind an error of SQLAlchemy or Optuna, in one line."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return one_line(error).split(" (Background on")[0]
