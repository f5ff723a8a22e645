"""A device guard that survives errors in backward.

While an error that Python code raised in backward unwinds through the engine, a destructor asks the
guard for its device type. Python's error is still set then, and a Python function that returns in
that state ends the process. So the guard takes the error first, the engine raises a `SystemError`
for want of it, and `lost_errors_found` raises the original again.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

from autobatch.support.torch_private import PRIVATE_USE_1, DeviceGuard

__all__ = ["VirtualDeviceGuard", "lost_errors_found"]

_error = tuple(ctypes.py_object() for _ in range(3))  # its type, value and traceback
_slots = tuple(map(ctypes.byref, _error))
_lost: list[tuple[Any, ...]] = []


class VirtualDeviceGuard(DeviceGuard):
    """Tells the autograd engine its device type."""

    def type_(
        self,
        take: Any = ctypes.pythonapi.PyErr_Fetch,  # nothing may be looked up before it has run
        slots: Any = _slots,
    ) -> Any:
        """Take and keep an error that is set, and return the device type."""
        take(*slots)
        if _error[0]:
            _lost.append(tuple(part.value if part else None for part in _error))
        return PRIVATE_USE_1


@contextlib.contextmanager
def lost_errors_found() -> Iterator[None]:
    """Raise the error that the guard took, in place of the engine's complaint that it is gone."""
    try:
        yield
    except SystemError:
        if not _lost:
            raise
        kind, value, traceback = _lost[-1]
        _lost.clear()
        original: Exception = value if isinstance(value, Exception) else kind(value)
        raise original.with_traceback(traceback) from original.__cause__
