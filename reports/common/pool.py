"""Hand tasks to worker processes, and outlive what happens to them.

Invariant: every key of every task gets exactly one record, and no worker outlives `run_tasks`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import IO

from autobatch.support.units import GIB, format_bytes
from reports.common.journal import Record
from reports.common.memory import resident_bytes

TIME_LIMIT_S = 120.0
START_LIMIT_S = 180.0
"""Imports on a busy machine."""

MEMORY_LIMIT_BYTES = int(1.5 * GIB)
RETIRE_BYTES = int(1.1 * GIB)
"""A worker that holds more than this after a task is replaced."""

_POLL_S, _GRACE_S = 0.2, 5.0


class WorkersFailError(RuntimeError):
    """Workers do not even start."""


@dataclass(slots=True)
class Worker:
    """A process, and what it is at work on.

    Attributes:
        left: keys of its task without a record.
        began: when its task was handed over, or it was started.
    """

    process: subprocess.Popen[bytes]
    stderr: IO[bytes]
    began: float
    is_ready: bool = False
    task: Record | None = None
    left: set[str] = field(default_factory=set)
    buffer: bytes = b""

    def give(self, task: Record) -> None:
        self.task, self.left, self.began = task, set(task["keys"]), time.monotonic()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is seen on its stdout
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()

    def lines(self) -> list[bytes] | None:
        """Return the complete lines that have come; None at the end of its output."""
        assert self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        if not chunk:
            return None
        *complete, self.buffer = (self.buffer + chunk).split(b"\n")
        return complete

    def end(self, grace_s: float = 0.0) -> str:
        """End it, should it not end by itself, and say how it ended."""
        try:
            code = self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.stderr.seek(0)
        last = self.stderr.read()[-4000:].decode(errors="replace").strip().splitlines()[-1:]
        self.stderr.close()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return ": ".join([how, *last])


def run_tasks(
    tasks: Iterable[Record],
    *,
    command: Sequence[str],
    workers: int,
    record: Callable[[Record], None],
    time_limit_s: float = TIME_LIMIT_S,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> None:
    """Run every task.

    Args:
        tasks: each with its "keys".
        command: starts a worker, which says {"ready": true}, then for each line of stdin one
            record per key and {"done": true}.
        workers: how many at a time.
        record: told of each record as it comes.
        time_limit_s: for one task, after which its worker is ended.
        memory_limit_bytes: resident memory above which a worker is ended.

    Raises:
        WorkersFailError: a worker ended before it was ready.
    """
    waiting = deque(tasks)
    with _Crew(command, record) as crew:
        while waiting or any(worker.task for worker in crew.workers):
            busy = sum(worker.task is not None for worker in crew.workers)
            while len(crew.workers) < min(workers, busy + len(waiting)):
                crew.start()
            for worker in crew.workers:
                if waiting and worker.is_ready and worker.task is None:
                    worker.give(waiting.popleft())
            crew.listen()
            crew.enforce(time_limit_s, memory_limit_bytes)


class _Crew:
    """The workers that are alive."""

    def __init__(self, command: Sequence[str], record: Callable[[Record], None]):
        self.workers: list[Worker] = []
        self._command = command
        self._record = record
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self.workers):
            self._end(worker)
        self._selector.close()

    def start(self) -> None:
        stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the worker ends)
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        worker = Worker(process, stderr, time.monotonic())
        self.workers.append(worker)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]

    def listen(self) -> None:
        """Take what the workers say, for a moment."""
        for key, _ in self._selector.select(_POLL_S):
            worker: Worker = key.data
            lines = worker.lines()
            if lines is None:
                self._lost(worker)
                continue
            for line in lines:
                self._take(worker, json.loads(line))

    def _take(self, worker: Worker, message: Record) -> None:
        if message.get("ready"):
            worker.is_ready = True
        elif message.get("done"):
            worker.task = None
            if (resident_bytes(worker.process.pid) or 0) > RETIRE_BYTES:
                self._end(worker)
        elif message.get("key") in worker.left:
            worker.left.remove(message["key"])
            self._record(message)

    def enforce(self, time_limit_s: float, memory_limit_bytes: int) -> None:
        """End workers that take too long or too much."""
        for worker in list(self.workers):
            if worker.task is None and worker.is_ready:
                continue
            limit_s = time_limit_s if worker.is_ready else START_LIMIT_S
            resident = resident_bytes(worker.process.pid) if worker.is_ready else None
            if time.monotonic() - worker.began > limit_s:
                self._lost(worker, f"took more than {limit_s:g} s")
            elif resident is not None and resident > memory_limit_bytes:
                self._lost(worker, f"took more than {format_bytes(memory_limit_bytes)} of memory")

    def _lost(self, worker: Worker, reason: str | None = None) -> None:
        how = self._end(worker, 0.0 if reason else _GRACE_S)
        if not worker.is_ready:
            raise WorkersFailError(f"a worker ended before it was ready: {reason or how}")
        for key in sorted(worker.left):
            self._record({"key": key, "error": reason or f"the worker died ({how})"})

    def _end(self, worker: Worker, grace_s: float = 0.0) -> str:
        self.workers.remove(worker)
        self._selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
        return worker.end(grace_s)
