"""A Ctrl-C that neither kills the process nor gets lost.

Python raises `KeyboardInterrupt` between any two bytecodes. In code that C++ calls without being
ready for an error (destructors, callbacks of weak references, parts of the autograd engine) that
ends the process or is swallowed. So a Ctrl-C is held back while such code may run, and let through
between operators; what is let through and does not arrive is raised again at the end.

Invariant: the signal's handler is as before at the end, and an interrupt is delayed, never lost.
Only the main thread gets signals; in others, nothing happens here.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = [
    "TERMINATED",
    "arriving",
    "held",
    "interrupted_by_sigterm",
    "is_terminated",
    "let_through",
    "uninterrupted",
]

TERMINATED = 143
"""The exit code of a process that SIGTERM has ended, as a shell tells it."""

_CLEANING_S = 8.0
"""How long a process may clean up after a SIGTERM: Docker kills it after 10 seconds."""

_PATIENCE_S = 3.0
"""How long a Ctrl-C may be held back: where no operator runs for so long, Python code of the user's
does, which can be interrupted anywhere."""

_RETRY_CALLS = 1000
"""Operators after which an interrupt that the user's code has swallowed is raised again."""


class _Watch:
    """Stands before the handler of SIGINT that was there.

    Attributes:
        holds: how many blocks hold interrupts back.
        is_pressed: whether `let_through` has something to do.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self._handler = handler
        self._waiting: tuple[int, FrameType | None] | None = None
        self._raised: BaseException | None = None
        self._calls = 0
        self.holds = 0
        self.is_pressed = False

    def received(self, number: int, frame: FrameType | None) -> None:
        """Take the signal: the first one is held back where that was asked for."""
        if self.holds and self._waiting is None:
            self._waiting = number, frame
            self.is_pressed = True
            _thread.start_new_thread(self._hurry, (self._waiting,))  # takes no lock of Python's
        else:
            self._deliver(number, frame)

    def let_through(self) -> None:
        """Call the handler for what waits; raise again what it raised and user code swallowed."""
        if self._waiting is not None:
            self._deliver(*self._waiting)
        elif self._raised is not None:
            self._calls += 1
            if self._calls % _RETRY_CALLS == 0:
                raise self._raised
        else:
            self.is_pressed = False

    def leave(self, error: BaseException | None) -> None:
        """Let through what waits, and raise what did not arrive, at the end of a block."""
        if self._waiting is not None:
            self._deliver(*self._waiting)
        raised, self._raised, self.is_pressed = self._raised, None, False
        if raised is not None and error is not raised:
            raise raised.with_traceback(None) from None

    def _deliver(self, number: int, frame: FrameType | None) -> None:
        self._waiting = None
        try:
            self._handler(number, frame)
        except BaseException as error:
            self._raised, self._calls, self.is_pressed = error, 0, True
            raise

    def _hurry(self, call: tuple[int, FrameType | None]) -> None:
        """Send the signal once more where it still waits."""
        time.sleep(_PATIENCE_S)
        if self._waiting is call and _watch is self:
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(threading.main_thread().ident or 0, call[0])
            else:
                _thread.interrupt_main()


_watch: _Watch | None = None


@contextlib.contextmanager
def arriving() -> Iterator[None]:
    """Let no Ctrl-C of the block be swallowed: what it raised is raised again at the end."""
    global _watch
    handler: Any = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if _watch is not None or not is_main or not callable(handler):
        yield
        return
    watch = _Watch(handler)
    error: BaseException | None = None
    try:
        _watch = watch
        signal.signal(signal.SIGINT, watch.received)
        yield
    except BaseException as caught:
        error = caught
        raise
    finally:
        watch.holds += 1  # until the handler is back
        if signal.getsignal(signal.SIGINT) == watch.received:  # or the block has set another
            signal.signal(signal.SIGINT, handler)
        _watch = None
        watch.leave(error)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold a Ctrl-C back but where `let_through` is called, and raise it when the block is done.

    One that is pressed again, or that waited for three seconds, is let through at once.
    """
    with arriving():
        watch = _watch
        if watch is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        error: BaseException | None = None
        watch.holds += 1
        try:
            yield
        except BaseException as caught:
            error = caught
            raise
        finally:
            watch.holds -= 1
            if not watch.holds and watch.is_pressed:
                watch.leave(error)


def let_through() -> None:
    """Raise the interrupt that is held back, if any; called where code is ready for an error."""
    if (
        _watch is not None
        and _watch.is_pressed
        and threading.current_thread() is threading.main_thread()
    ):
        _watch.let_through()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay a Ctrl-C until the block is done: half a restore would lose weights."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    before: Any = signal.signal(signal.SIGINT, lambda *call: waiting.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting and callable(before):
            before(*waiting[0])


_terminated = False


def is_terminated() -> bool:
    """Whether a SIGTERM was what interrupted the process."""
    return _terminated


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let a SIGTERM interrupt the block as a Ctrl-C does, so that it cleans up.

    A second one ends the process at once, and so does a block that takes long to clean up. A
    process that ignores the signal goes on doing so. Only for processes that are autobatch's own.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def received(number: int, frame: FrameType | None) -> None:
        global _terminated
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:  # a fork, which has nothing of the block's to clean up
            os.kill(os.getpid(), number)
            return
        _terminated = True
        _thread.start_new_thread(_end_late, ())
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt):  # ignored, as in the background of a script
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)

    signal.signal(signal.SIGTERM, received)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_late() -> None:
    time.sleep(_CLEANING_S)
    os._exit(TERMINATED)
