"""Files that a data set reads: where they are, and how they are put back to there."""

from __future__ import annotations

import functools
import io
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

__all__ = ["file_kept", "is_closed", "is_file", "wrapped"]

_MOST_BYTES = 2**20
_MOST_OF_A_TEXT = 2**28
"""Bytes of a file of which characters are counted, to find the place that it does not tell."""

_WRAPPED = ("buffer", "raw", "fileobj", "_fileobj", "_fp", "_file", "_buffer")
"""Attributes of files that read other ones, and put them where they need them."""


def is_file(value: Any) -> bool:
    """Say whether a value is an open or closed file, of any kind that Python has."""
    return isinstance(value, (io.IOBase, mmap.mmap))


def file_kept(file: Any) -> Callable[[], None] | None:
    """Return what puts a file back to where it is; None for one that is closed or only written.

    Raises:
        OSError: its place cannot be told, as that of a pipe.
    """
    if is_closed(file) or (isinstance(file, io.IOBase) and not file.readable()):
        return None
    if isinstance(file, (io.BytesIO, io.StringIO)):
        return _memory_kept(file)
    if isinstance(file, io.IOBase) and not file.seekable():
        raise OSError("not seekable")
    return functools.partial(_seek, file, _place(file))


def wrapped(file: Any) -> Iterator[Any]:
    """Yield the files that a file reads, which it puts back itself."""
    for name in _WRAPPED:
        inner = None
        with suppress(ValueError):  # it was detached
            inner = getattr(file, name, None)
        if is_file(inner) or hasattr(inner, "_file"):
            yield inner
            yield from wrapped(inner)


def is_closed(file: Any) -> bool:
    """Say whether a file is closed, or was detached from the one that it reads."""
    try:
        return bool(file.closed)
    except ValueError:
        return True


def _seek(file: Any, place: int) -> None:
    with suppress(OSError):  # in the midst of `for line in file`, a text does not tell
        if file.tell() == place:
            return
    file.seek(place)


def _place(file: Any) -> int:
    """Return where a file is, for `seek`."""
    try:
        return int(file.tell())
    except OSError:
        if not isinstance(file, io.TextIOWrapper) or _size(file) > _MOST_OF_A_TEXT:
            raise
    # After next(file), it does not tell, but the characters up to its end can be counted.
    left = _characters(file)
    file.seek(0)
    read = _characters(file) - left
    file.seek(0)
    file.read(read)
    return file.tell()


def _size(file: io.TextIOWrapper) -> int:
    return os.fstat(file.fileno()).st_size


def _characters(file: io.TextIOWrapper) -> int:
    return sum(map(len, iter(functools.partial(file.read, _MOST_BYTES), "")))


def _memory_kept(file: Any) -> Callable[[], None]:
    """Keep the place in a file in memory, and what it holds where that is small."""
    place, held = file.tell(), file.getvalue()
    if len(held) > _MOST_BYTES:
        return functools.partial(_seek, file, place)

    def put_back() -> None:
        if file.getvalue() != held:
            file.seek(0)
            file.truncate()
            file.write(held)
        file.seek(place)

    return put_back
