"""Probe in a process of its own, so that what kills the probe spares the process of the caller.

Invariant: whatever becomes of the child, `apart` returns its answer or raises one error and leaves
no child behind; each line of the log is on disk before the child goes on.
"""

from __future__ import annotations

import faulthandler
import inspect
import json
import multiprocessing
import multiprocessing.resource_tracker
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from autobatch import errors
from autobatch.errors import AutobatchError, FileError, ProbeDiedError, UsageError
from autobatch.plan.plan import Plan
from autobatch.records.codec import decode, encode, parse_json
from autobatch.records.evidence import Trial
from autobatch.records.progress import Progress, ProgressCallback, silent
from autobatch.support import process
from autobatch.support.collection import quick_exit
from autobatch.support.files import prepare_folder, user_folder
from autobatch.support.wording import ON_COMMAND_LINE, for_reader, one_line
from autobatch.tuning.users_traceback import UsersTraceback, users_traceback

__all__ = ["RemoteTraceback", "apart"]

T = TypeVar("T")

_LOG, _PLAN, _WORK = "log.jsonl", "plan.json", "work.pickle"
_ANSWER = "answer.pickle"
_AHEAD = "ahead"
_NAME = "autobatch probe in "
"""What a child is called before its folder; it knows its name before it imports anything."""

_POLL_S, _GRACE_S = 0.05, 3.0
_INTERRUPTED = 130


class RemoteTraceback(Exception):
    """The traceback of another process, as text: the cause of an error that crossed over.

    Attributes:
        users: the part of it that is the user's.
    """

    def __init__(self, text: str, users: UsersTraceback | None = None) -> None:
        super().__init__(text)
        self.users = users or UsersTraceback()


def apart(
    work: Callable[..., T],
    /,
    *args: Any,
    progress: ProgressCallback = silent,
    time_limit: float | None = None,
    on_gpu: bool = True,
    **kwargs: Any,
) -> T:
    """Call `work(*args, progress=..., **kwargs)` in a child process and return its answer.

    The child starts afresh ("spawn"), because CUDA does not survive a fork; everything sent is
    pickled. It ends with this process, however this process ends.

    Args:
        work: a function at the top level of a module.
        args: its positional arguments.
        progress: told of each step and each trial, in this process.
        time_limit: seconds that the child may be silent, one trial's time; None waits for ever.
        on_gpu: whether the child uses a real GPU, for the advice where it crashes.
        kwargs: its keyword arguments.

    Raises:
        UsageError: an argument cannot be sent, or the script cannot be imported by the child.
        ProbeDiedError: the child died or said nothing for `time_limit`; its log is kept.
        AutobatchError: what `work` raised, as the same class; another exception is a WorkloadError.
    """
    _require_a_parent()
    with _record() as folder:
        _send(folder, work, args, kwargs)
        with _running(folder) as child:
            told = _follow(child, folder, progress, time_limit, on_gpu)
        if "error" in told:
            raise _received(told["error"])
        answer: Any
        if "plan" in told:
            answer = Plan.load(folder / str(told["plan"]))
        else:  # written by our own child, in a folder that is ours alone
            answer = pickle.loads((folder / _ANSWER).read_bytes())
        return answer  # type: ignore[no-any-return]


def _here() -> str:
    """Say how to run in this process."""
    return for_reader("leave isolate out", "add --no-isolate")


def _sendable() -> str:
    return (
        "define it at the top level of a module, use the command line with file.py:function, or "
        + _here()
    )


def _guard() -> str:
    return (
        'put what the script does under `if __name__ == "__main__":`, because the probe runs in a '
        f"process of its own that imports the script again; or {_here()}"
    )


def _require_a_parent() -> None:
    """Refuse processes that cannot have children; a child that re-runs its script ends here."""
    this = multiprocessing.current_process()
    if getattr(this, "_inheriting", False):  # multiprocessing's own mark while it imports a script
        if this.name.startswith(_NAME):
            refusal = _error("UsageError", f"the script has no guard: {_guard()}")
            _append(Path(this.name.removeprefix(_NAME)), refusal)
            os._exit(1)
        raise UsageError(f"the script has no guard: {_guard()}")
    if this.daemon:
        raise UsageError(f"the daemonic process {this.name!r} cannot have children: {_here()}")


@contextmanager
def _record() -> Iterator[Path]:
    """Give a folder for the log; of a probe that died, the log stays."""
    prefix = time.strftime("%Y%m%d-%H%M%S-")
    try:
        parent = prepare_folder(user_folder() / "probes")
    except FileError:
        folder = Path(tempfile.mkdtemp(prefix=f"autobatch-{prefix}"))
    else:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        (folder / _LOG).touch()
        yield folder
    except ProbeDiedError:
        (folder / _WORK).unlink(missing_ok=True)
        shutil.rmtree(folder / _AHEAD, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _send(
    folder: Path, work: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    # Into a file, and not through multiprocessing: with torch its pickles move the user's tensors
    # into shared memory, which is small in containers.
    try:
        _pickle((work, args, kwargs), folder / _WORK)
    except OSError as error:
        raise FileError(
            f"cannot write the model and its arguments into {str(folder)!r}: {one_line(error)}; "
            f"free some space there, or {_here()}"
        ) from error
    except Exception as error:
        raise UsageError(
            f"{_unsendable(work, args, kwargs)} cannot be sent to the process of the probe "
            f"({one_line(error)}): {_sendable()}"
        ) from error


def _unsendable(work: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    named = {"work": work, **inspect.signature(work).bind_partial(*args).arguments, **kwargs}
    for name, value in tuple(named.items()):
        if is_dataclass(value):  # a record of arguments: name the one in it
            named |= {each.name: getattr(value, each.name) for each in fields(named.pop(name))}
    guilty = [name for name, value in named.items() if not _is_sendable(value)]
    return " and ".join(f"{name} (a {type(named[name]).__name__})" for name in guilty)


def _is_sendable(value: object) -> bool:
    try:
        _pickle(value, Path(os.devnull))
    except Exception:
        return False
    return True


def _pickle(value: object, path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump(value, file, protocol=pickle.HIGHEST_PROTOCOL)


@contextmanager
def _running(folder: Path) -> Iterator[BaseProcess]:
    """Start the child of a folder; it has ended when the block is left."""
    child = multiprocessing.get_context("spawn").Process(
        target=_child,
        args=(str(folder), process.is_ours(), ON_COMMAND_LINE.get()),
        name=f"{_NAME}{folder}",
    )
    chosen = multiprocessing.get_start_method(allow_none=True)
    try:
        with _deaf_to_interrupts():
            child.start()
        if not chosen:  # starting a child settles the default, which is the user's to choose
            multiprocessing.set_start_method(None, force=True)
        yield child
        child.join(_GRACE_S)
    finally:
        for end in (child.terminate, child.kill):
            if child.is_alive():
                end()
                child.join(_GRACE_S)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Let a process that is started in the block never see a Ctrl-C: its parent ends it.

    A terminal sends one to both, and the child would print where it was.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # starting this process of Python's own would let interrupts through again
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(
    child: BaseProcess,
    folder: Path,
    progress: ProgressCallback,
    time_limit: float | None,
    on_gpu: bool,
) -> Mapping[str, Any]:
    """Pass on what the log says until its last line, and return that."""
    steps: list[Progress] = []
    heard = time.monotonic()
    with (folder / _LOG).open("rb") as log:
        while True:
            ended = not child.is_alive()  # asked first, to read all that it wrote before its death
            for line in _complete_lines(log):
                if "progress" not in line:
                    return line
                steps.append(decode(Progress, {**line["progress"], "trial": line.get("trial")}))
                progress(steps[-1])
                heard = time.monotonic()
            if ended:
                raise _ended(child.exitcode or 0, steps, folder, on_gpu)
            if time_limit is not None and time.monotonic() - heard > time_limit:
                what = f"the probe gave no answer for {time_limit:g} s"
                raise _died(what, steps, folder, "allow more time if one trial may take as long")
            child.join(_POLL_S)


def _complete_lines(log: BinaryIO) -> Iterator[dict[str, Any]]:
    while (line := log.readline()).endswith(b"\n"):
        parsed = parse_json(line.decode())
        assert isinstance(parsed, dict)
        yield parsed
    log.seek(-len(line), os.SEEK_CUR)


def _ended(code: int, steps: Sequence[Progress], folder: Path, on_gpu: bool) -> AutobatchError:
    if code >= 0 and (folder / _WORK).exists():
        return UsageError(
            f"the process of the probe ended before the probe began (exit code {code}), while it "
            f"imported the script: {_guard()}"
        )
    names = {-known.value: f"died of {known.name}" for known in signal.Signals}
    if code >= 0:
        advice = "let nothing in the model, loss or data end the process"
    elif code == -signal.SIGKILL:
        advice = "free some of the machine's memory, whose shortage is the usual reason"
    elif on_gpu:
        advice = "set CUDA_LAUNCH_BLOCKING=1 to see the operation that fails, or ask for less"
    else:
        advice = "the crash is in what the model, loss or data call: run these by themselves"
    how = names.get(code, f"ended with exit code {code}")
    return _died(f"the probe {how}", steps, folder, advice)


def _died(what: str, steps: Sequence[Progress], folder: Path, advice: str) -> ProbeDiedError:
    trials = [step.trial for step in steps if step.trial is not None]
    fitting = max((t for t in trials if t.fits), key=lambda t: t.micro_batch, default=None)
    largest = f", the largest that fitted: {_size(fitting)}" if fitting else ""
    return ProbeDiedError(
        f"{what} {_moment(steps)}; finished trials: {len(trials)}{largest}; "
        f"its log is {str(folder / _LOG)!r}; {advice}"
    )


def _moment(steps: Sequence[Progress]) -> str:
    if not steps:
        return "before its first trial"
    last = steps[-1]
    if last.trial is not None:
        return f"after the trial of {_size(last.trial)}"
    if last.micro_batch is None:
        return f"while {last.step}"
    return f"while micro-batch {last.micro_batch:,} ran ({last.step})"


def _size(trial: Trial) -> str:
    return f"micro-batch {trial.micro_batch:,} with accumulation steps {trial.accumulation_steps}"


def _received(error: Mapping[str, Any]) -> AutobatchError:
    kind = getattr(errors, error["kind"]) if error["kind"] in errors.__all__ else AutobatchError
    received: AutobatchError = kind(error["message"])
    if error["traceback"]:
        users = decode(UsersTraceback, error["users"])
        received.__cause__ = RemoteTraceback("\n" + error["traceback"], users)
    return received


def _child(folder_name: str, ours: bool, on_command_line: bool) -> None:
    """Do the work in a folder and tell its log; the main function of the child."""
    with suppress(OSError, RuntimeError):  # where there is no stderr
        os.dup2(2, 1)  # stdout is for the answer, which the parent gives
        faulthandler.enable()
    sys.stdout = sys.stderr
    _end_with_parent()
    ON_COMMAND_LINE.set(on_command_line)
    if ours:
        process.claim()
    folder = Path(folder_name)
    try:
        _append(folder, _outcome(folder))
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    finally:
        quick_exit()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    assert parent.pid is not None
    process.end_with_parent(parent.pid)


def _outcome(folder: Path) -> dict[str, Any]:
    """Return the last line of the log."""
    try:
        with (folder / _WORK).open("rb") as file:
            work, args, kwargs = pickle.load(file)
    except Exception as error:
        what = f"the process of the probe cannot rebuild what it was sent ({one_line(error)})"
        return _error("UsageError", f"{what}: {_sendable()}", error)
    (folder / _WORK).unlink()
    from autobatch.devices.virtual.ahead import running_ahead

    try:
        with running_ahead(folder / _AHEAD):
            answer = work(*args, progress=partial(_tell, folder), **kwargs)
        if isinstance(answer, Plan):
            answer.save(folder / _PLAN)
            return {"plan": _PLAN}
        _pickle(answer, folder / _ANSWER)
        return {"answer": _ANSWER}
    except AutobatchError as error:
        known = (kind.__name__ for kind in type(error).__mro__ if kind.__name__ in errors.__all__)
        return _error(next(known), str(error), error.__cause__)
    except Exception as error:
        return _error("WorkloadError", f"the probe raised {one_line(error)}", error)


def _tell(folder: Path, step: Progress) -> None:
    fields = encode(step)
    trial = fields.pop("trial")
    _append(folder, ({"trial": trial} if trial else {}) | {"progress": fields})


def _append(folder: Path, line: Mapping[str, Any]) -> None:
    with (folder / _LOG).open("ab") as log:
        log.write(json.dumps(line).encode() + b"\n")
        log.flush()
        os.fsync(log.fileno())


def _error(kind: str, message: str, cause: BaseException | None = None) -> dict[str, Any]:
    text = "" if cause is None else "".join(traceback.format_exception(cause))
    users = None if cause is None else encode(users_traceback(cause))
    return {"error": {"kind": kind, "message": message, "traceback": text, "users": users}}
