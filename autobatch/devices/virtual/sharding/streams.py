"""Streams and events of a simulated device: FSDP2 allocates on streams of its own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from autobatch.devices.virtual.backend import Inert
from autobatch.support.torch_private import PRIVATE_USE_1

__all__ = ["Streams"]


class _Stream(Inert):
    """A stream of the simulated device; work on it is done at once."""

    device_index = 0

    def __init__(self, stream_id: int):
        self.stream_id = stream_id
        self.device_type = int(PRIVATE_USE_1)


class Streams:
    """The streams of the device: which one is current, and numbers for them in a trace."""

    def __init__(self, module: Any):
        """Number the streams that a device's module says are current."""
        self._module = module
        self._ids = itertools.count()
        self._current = _Stream(next(self._ids))
        self._numbers: dict[int, int] = {}

    def number(self) -> int:
        """Return the number of the current stream, 0 for the one that the run begins on."""
        stream_id = self._module.current_stream().stream_id
        return self._numbers.setdefault(stream_id, len(self._numbers))

    def answers(self) -> dict[str, Callable[..., Any]]:
        """Return what takes the place of functions and classes of the device's module, by name."""
        return {
            "Stream": lambda *args, **kwargs: _Stream(next(self._ids)),
            "current_stream": lambda device=None: self._current,
            "stream": self._switched,
            "is_initialized": lambda: True,
        }

    @contextlib.contextmanager
    def _switched(self, stream: _Stream | None) -> Iterator[None]:
        before = self._current
        self._current = stream or before
        try:
            yield
        finally:
            self._current = before
