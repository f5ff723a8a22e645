"""Functions for the child processes of test_isolation.py; a child imports them by this name."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from autobatch.errors import DoesNotFitError, UsageError, WorkloadError
from autobatch.plan.plan import Plan
from autobatch.records.progress import Progress, ProgressCallback
from autobatch.support import process
from tests.support.plans import example_plan

TRIALS = example_plan().trials


def steps_of_two_trials() -> list[Progress]:
    steps = []
    for done, trial in enumerate(TRIALS[:2]):
        size = trial.micro_batch
        steps.append(Progress(step="measuring", executions=done, expected=3, micro_batch=size))
        steps.append(Progress(step="measured", executions=done + 1, expected=3, trial=trial))
    return steps


def answers(*, progress: ProgressCallback, **changes: Any) -> Plan:
    for step in steps_of_two_trials():
        progress(step)
    return example_plan(**changes)


def dies_by(number: int, *, progress: ProgressCallback) -> Plan:
    answers(progress=progress)
    progress(Progress(step="measuring", executions=2, expected=3, micro_batch=64))
    os.kill(os.getpid(), number)
    return sleeps(progress=progress)


def dies_between_trials(*, progress: ProgressCallback) -> Plan:
    answers(progress=progress)
    os._exit(7)


def dies_at_once(*, progress: ProgressCallback) -> Plan:
    os._exit(0)


def leaves(*, progress: ProgressCallback) -> Plan:
    progress(Progress(step="searching", executions=0, expected=3))
    sys.exit(4)


def sleeps(
    pid_file: Path | None = None, deaf_to: int | None = None, *, progress: ProgressCallback
) -> Plan:
    if deaf_to is not None:
        signal.signal(deaf_to, signal.SIG_IGN)
    progress(Progress(step="measuring", executions=0, expected=3, micro_batch=2))
    if pid_file is not None:
        pid_file.with_suffix(".part").write_text(str(os.getpid()))
        pid_file.with_suffix(".part").replace(pid_file)
    time.sleep(60)
    raise AssertionError("nobody ended this process")


def sleeps_unknown_to_the_kernel(pid_file: Path, *, progress: ProgressCallback) -> Plan:
    """Sleep without the kernel's promise to end this process with its parent."""
    ctypes.CDLL(None).prctl(1, 0)
    return sleeps(pid_file, progress=progress)


class StrangeUsageError(UsageError):
    """A class that autobatch.errors does not have."""


def fails(kind: str, *, progress: ProgressCallback) -> Plan:
    if kind == "WorkloadError":
        try:
            raise KeyError("missing layer")
        except KeyError as error:
            raise WorkloadError("the model raised KeyError") from error
    if kind == "DoesNotFitError":
        raise DoesNotFitError("not even micro-batch 1 fits")
    if kind == "StrangeUsageError":
        raise StrangeUsageError("headroom is 'x'")
    raise ZeroDivisionError("of a\nkind")


def prints(*, progress: ProgressCallback) -> Plan:
    print("from python")
    os.write(1, b"from C\n")
    return example_plan()


def says_whose_process_it_is(*, progress: ProgressCallback) -> Plan:
    return example_plan(warnings=("ours" if process.is_ours() else "a guest's",))


class Unloadable:
    """Can be pickled, but not rebuilt."""

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, ()


def rebuild() -> None:
    raise LookupError("no such layer here")
