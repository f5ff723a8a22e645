"""A device guard that survives errors in backward.

While an error of Python code in the autograd thread unwinds through the engine, a destructor asks
the guard for its device type with Python's error still set, and a Python function that returns in
that state ends the process. So the error is set aside first, and `lost_errors_found` raises it
again.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

from autobatch.support.torch_private import PRIVATE_USE_1, DeviceGuard

__all__ = ["VirtualDeviceGuard", "lost_errors_found"]

_error = tuple(ctypes.py_object() for _ in range(3))
_slots = tuple(map(ctypes.byref, _error))
_lost: list[tuple[Any, ...]] = []


class VirtualDeviceGuard(DeviceGuard):
    """Tells the autograd engine its device type."""

    def type_(
        self,
        take: Any = ctypes.pythonapi.PyErr_Fetch,  # nothing may be looked up before it has run
        slots: Any = _slots,
    ) -> Any:
        """Return the device type; an error that is set is taken and kept."""
        take(*slots)
        if _error[0]:
            _lost.append(tuple(part.value if part else None for part in _error))
        return PRIVATE_USE_1


@contextlib.contextmanager
def lost_errors_found() -> Iterator[None]:
    """Raise what really went wrong where the engine lost the error that the guard took."""
    try:
        yield
    except SystemError:
        if not _lost:
            raise
        kind, value, traceback = _lost[-1]
        _lost.clear()
        original: Exception = value if isinstance(value, Exception) else kind(value)
        raise original.with_traceback(traceback) from original.__cause__
