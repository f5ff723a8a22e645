"""Runs that helper processes execute while this one is busy: those likely to be asked for next.

`run_ahead` forks helpers, which work through a list of runs; `taken` returns what they found.
Whoever begins a run first claims it, so that none is executed twice.

Nothing is forked outside of `running_ahead`, which belongs to a process that autobatch started for
itself: there no CUDA context, no lock that a thread of the user's holds and no thread of autograd's
is in the way.

Invariant: what is taken is what this process would have found; a helper that fails sends nothing.
"""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from autobatch.support.process import end_with_parent
from autobatch.support.torch_private import OpOverload

__all__ = ["Task", "run_ahead", "running_ahead", "taken"]

Task = tuple[Hashable, Callable[[], Any]]
"""What a result is asked for by, and what makes it; None is no result."""

_MOST_HELPERS = 4
"""Helpers of one list: the next run is rarely foreseen for more."""

_lists: list[_List] | None = None


@contextlib.contextmanager
def running_ahead() -> Iterator[None]:
    """Let helpers run what is foreseen in the block, where that is safe; they end with it."""
    global _lists
    if not _may_fork() or _lists is not None:
        yield
        return
    # an engine that has run before the simulated device is known starts no threads, which would
    # not survive a fork
    torch.ones((), requires_grad=True).backward()
    _lists = []
    try:
        yield
    finally:
        for each in _lists:
            each.close()
        _lists = None


def run_ahead(tasks: Iterable[Task]) -> None:
    """Let helpers begin with tasks, the first one first, if there are idle cores for them.

    Tasks are asked for only where there are.
    """
    if _lists is None:
        return
    idle = _cores() - 1 - sum(each.busy() for each in _lists)
    if idle <= 0:
        return
    new = [task for task in tasks if not any(task[0] in each.keys for each in _lists)]
    if new:
        with contextlib.suppress(OSError, ImportError):  # no process, memory or semaphore is left
            _lists.append(_List(new, min(idle, len(new), _MOST_HELPERS)))


def taken(key: Hashable) -> Any:
    """Return what a helper found, once; None where none has begun with it, or where it failed."""
    for each in _lists or ():
        if key in each.keys:
            return each.take(key)
    return None


def _may_fork() -> bool:
    is_daemon = multiprocessing.current_process().daemon
    return (
        sys.platform == "linux" and _cores() > 1 and not is_daemon and not torch.cuda.is_available()
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


class _List:
    """Tasks, and the helpers that work through them.

    Attributes:
        keys: of the tasks whose results were not taken, with their places in the list.
    """

    def __init__(self, tasks: Sequence[Task], helpers: int) -> None:
        """Start helpers; each has this process's memory as it is now."""
        self.keys = {key: place for place, (key, _) in enumerate(tasks)}
        self._tasks = tasks  # keys hold ids of what these hold
        self._ended: dict[int, bool] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="autobatch-ahead-")
        context = multiprocessing.get_context("fork")
        self._claims = context.Array("b", len(tasks))
        self._told, tell = context.Pipe(duplex=False)
        self._helpers: list[BaseProcess] = []
        arguments = (tasks, self._claims, tell, Path(self._folder.name), os.getpid())
        try:
            with warnings.catch_warnings():  # Python cannot know what other threads do: they wait
                warnings.simplefilter("ignore", DeprecationWarning)
                for _ in range(helpers):
                    helper = context.Process(target=_help, args=arguments, daemon=True)
                    helper.start()
                    self._helpers.append(helper)
        except OSError:
            self.close()
            raise
        tell.close()

    def busy(self) -> int:
        """Return how many helpers are at work."""
        return sum(helper.is_alive() for helper in self._helpers)

    def take(self, key: Hashable) -> Any:
        """Return the result of a task, waiting for a helper that is at it; None if none was."""
        place = self.keys.pop(key)
        if _claimed(self._claims, place):
            return None
        while place not in self._ended:
            try:
                ended, has_result = self._told.recv()
            except EOFError:  # a helper died at it
                return None
            self._ended[ended] = has_result
        if not self._ended[place]:
            return None
        return pickle.loads(_file(Path(self._folder.name), place).read_bytes())

    def close(self) -> None:
        """End the helpers, whatever they are at."""
        for helper in self._helpers:
            helper.kill()
        for helper in self._helpers:
            helper.join()
        self._told.close()
        self._folder.cleanup()


def _claimed(claims: Any, place: int) -> bool:
    """Claim a task, and say whether nobody had."""
    with claims.get_lock():
        is_free = not claims[place]
        claims[place] = 1
    return is_free


def _file(folder: Path, place: int) -> Path:
    return folder / f"{place}.pickle"


def _help(tasks: Sequence[Task], claims: Any, tell: Connection, folder: Path, parent: int) -> None:
    """Work through tasks; the main function of a helper."""
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    sys.stdout = sys.stderr = os.fdopen(nowhere, "w")
    torch.set_num_threads(1)  # OpenMP's threads did not survive the fork
    gc.disable()  # runs collect what they leave, and looking at the rest would copy it
    for place, (_, run) in enumerate(tasks):
        if not _claimed(claims, place):
            continue
        has_result = False
        with contextlib.suppress(Exception):
            result = run()
            if result is not None:
                _file(folder, place).write_bytes(_pickled(result))
                has_result = True
        tell.send((place, has_result))


def _pickled(result: Any) -> bytes:
    written = io.BytesIO()
    _Pickler(written, protocol=pickle.HIGHEST_PROTOCOL).dump(result)
    return written.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles ops by their names."""

    def reducer_override(self, value: Any) -> Any:
        """Return how to make an op again; NotImplemented for all else."""
        if isinstance(value, OpOverload):
            return _op, (value.namespace, value._opname, value._overloadname)
        return NotImplemented


def _op(namespace: str, name: str, overload: str) -> Any:
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)
