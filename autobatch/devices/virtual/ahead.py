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
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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

_PATIENCE_S = 120.0
"""A helper that has not finished a run in so long after it was asked for is given up."""

_running: _Running | None = None


@contextlib.contextmanager
def running_ahead(folder: Path) -> Iterator[None]:
    """Let helpers run what is foreseen in the block, where that is safe; they end with it.

    Args:
        folder: where they leave what they find; it is made, and removed.
    """
    global _running
    if not _may_fork() or _running is not None:
        yield
        return
    # an engine that has run before the simulated device is known starts no threads, which would
    # not survive a fork; the user's script may have set another default device
    torch.ones((), device="cpu", requires_grad=True).backward()
    _running = _Running(folder)
    try:
        yield
    finally:
        for each in _running.lists:
            each.close()
        shutil.rmtree(folder, ignore_errors=True)
        _running = None


def run_ahead(tasks: Iterable[Task]) -> None:
    """Let helpers begin with tasks, the first one first, if there are idle cores for them.

    Tasks are asked for only where there are.
    """
    if _running is None:
        return
    lists = _running.lists
    idle = _cores() - 1 - sum(each.busy() for each in lists)
    if idle <= 0:
        return
    new = [task for task in tasks if not any(task[0] in each.keys for each in lists)]
    if new:
        with contextlib.suppress(OSError, ImportError):  # no process, memory or semaphore is left
            folder = _running.folder / str(len(lists))
            lists.append(_List(new, min(idle, len(new), _MOST_HELPERS), folder))


def taken(key: Hashable) -> Any:
    """Return what a helper found, once; None where none has begun with it, or where it failed."""
    for each in _running.lists if _running is not None else ():
        if key in each.keys:
            return each.take(key)
    return None


@dataclass(slots=True)
class _Running:
    """The lists of a block, each with a folder of its own in this one."""

    folder: Path
    lists: list[_List] = field(default_factory=list)


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

    def __init__(self, tasks: Sequence[Task], helpers: int, folder: Path) -> None:
        """Start helpers; each has this process's memory as it is now."""
        self.keys = {key: place for place, (key, _) in enumerate(tasks)}
        self._tasks = tasks  # keys hold ids of what these hold
        self._ended: dict[int, bool] = {}
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)  # of a list that could not be had
        context = multiprocessing.get_context("fork")
        self._claims = context.Array("b", len(tasks))
        self._told, tell = context.Pipe(duplex=False)
        self._helpers: list[BaseProcess] = []
        arguments = (tasks, self._claims, tell, folder, os.getpid())
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
            if not self._told.poll(_PATIENCE_S):  # what it waits for may be a thread of the parent
                self.close()
                return None
            try:
                ended, has_result = self._told.recv()
            except EOFError:  # a helper died at it
                return None
            self._ended[ended] = has_result
        return pickle.loads(_file(self._folder, place).read_bytes()) if self._ended[place] else None

    def close(self) -> None:
        """End the helpers, whatever they are at; nothing is taken afterwards."""
        self.keys.clear()
        for helper in self._helpers:
            helper.kill()
        for helper in self._helpers:
            helper.join()
        self._told.close()


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
