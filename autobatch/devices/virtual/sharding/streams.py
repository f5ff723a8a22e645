"""Streams and events of a simulated device: FSDP2 allocates on streams of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from autobatch.support.torch_private import PRIVATE_USE_1

__all__ = ["Streams"]


class _Event:
    """Something to wait for that has happened."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, stream: Any = None) -> _Event:
        return self

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream:
    """A stream of the simulated device; work on it is done at once."""

    device_index = 0

    def __init__(self, stream_id: int):
        self.stream_id = stream_id
        self.device_type = int(PRIVATE_USE_1)

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None:
        pass


class Streams:
    """The streams of the device: which one is current, and numbers for them in a trace."""

    def __init__(self, handle: Any):
        self._handle = handle
        self._made: list[_Stream] = []
        self._current = self._make()
        self._numbers: dict[int, int] = {}

    def number(self) -> int:
        """Return the number of the current stream, 0 for the one that the run begins on."""
        stream_id = self._handle.current_stream().stream_id
        return self._numbers.setdefault(stream_id, len(self._numbers))

    def answers(self) -> dict[str, Callable[..., Any]]:
        """Return what PyTorch looks up in a device's module."""
        return {
            "Stream": lambda *args, **kwargs: self._make(),
            "Event": _Event,
            "current_stream": lambda device=None: self._current,
            "stream": self._switched,
            "is_initialized": lambda: True,
        }

    def _make(self) -> _Stream:
        self._made.append(_Stream(len(self._made)))
        return self._made[-1]

    @contextlib.contextmanager
    def _switched(self, stream: _Stream | None) -> Iterator[None]:
        before = self._current
        self._current = stream or before
        try:
            yield
        finally:
            self._current = before
