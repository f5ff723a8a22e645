"""Where a command begins and ends: exit codes, and errors as messages.

Invariant: this is the only place where errors become messages and exit codes. The answer goes to
stdout, progress and errors to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from autobatch.cli.completion import complete
from autobatch.cli.importing import require_importable_torch
from autobatch.cli.parser import parsed, parser
from autobatch.errors import AutobatchError, WorkloadError
from autobatch.support import process
from autobatch.support.collection import quick_exit
from autobatch.support.exits import exits_reported
from autobatch.support.interrupts import TERMINATED, interrupted_by_sigterm, is_terminated
from autobatch.support.wording import ON_COMMAND_LINE

__all__ = ["entry", "main"]

_USAGE, _BROKEN_PIPE, _INTERRUPTED = 2, 141, 130

_NOT_WRITTEN = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF))
"""What a stream answers that takes no more: a full disk, most of the time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done, 1: the workload failed, or `check` found the gradients different, 2: usage, 3: nothing
    fits, 130: interrupted, 143: ended by SIGTERM.
    """
    given = sys.argv[1:] if argv is None else argv
    if not given:
        parser().print_help(sys.stderr)
        return 0
    import shlex

    reader = ON_COMMAND_LINE.set(True)
    arguments = argparse.Namespace(debug="--debug" in given, quiet=False)
    try:
        try:
            arguments = parsed(given)
        except SystemExit as exit_:  # argparse has printed its message
            sys.stdout.flush()
            return exit_.code if isinstance(exit_.code, int) else _USAGE
        require_importable_torch()
        arguments.command = shlex.join(["autobatch", *given])
        with exits_reported("the workload"):
            code: int | None = arguments.run(arguments)
        sys.stdout.flush()
    except AutobatchError as error:
        with contextlib.suppress(OSError):  # the exit code tells it, too
            _tell(error, arguments)
        return error.exit_code
    except BrokenPipeError:
        _let_go_of_stdout()
        return _BROKEN_PIPE
    except OSError as error:
        if error.errno not in _NOT_WRITTEN or error.filename is not None:
            raise  # it is not about what is printed
        _let_go_of_stdout()
        with contextlib.suppress(OSError):  # both streams may be on the same disk
            if arguments.debug:
                traceback.print_exc()
            print(
                f"autobatch: error: what is printed cannot be written: {os.strerror(error.errno)}",
                file=sys.stderr,
            )
        return _USAGE
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            _tell_interrupt(arguments)
        return _interrupted()
    finally:
        ON_COMMAND_LINE.reset(reader)
    return code or 0


def _tell(error: AutobatchError, arguments: argparse.Namespace) -> None:
    """Print an error, with the user's lines that led to it; with --debug, all of the traceback."""
    message = str(error)
    if arguments.debug:
        traceback.print_exc()
    if isinstance(error, WorkloadError) and error.__cause__ is not None:
        from autobatch.tuning.isolation import RemoteTraceback
        from autobatch.tuning.users_traceback import users_traceback

        cause = error.__cause__
        users = cause.users if isinstance(cause, RemoteTraceback) else users_traceback(cause)
        if not arguments.debug and not arguments.quiet:
            print(users.shown(message), end="", file=sys.stderr)
        if users.where:
            message += f" ({users.where})"
        elif not arguments.debug and not users.is_syntax:
            message += "; add --debug for its traceback"
    print(f"autobatch: error: {message}", file=sys.stderr)


def _tell_interrupt(arguments: argparse.Namespace) -> None:
    how = "terminated" if is_terminated() else "interrupted"
    kept = "; the study keeps its finished trials" if getattr(arguments, "storage", None) else ""
    above = "\n" if sys.stderr.isatty() else ""  # below the ^C that the terminal shows
    print(f"{above}autobatch: {how}{kept}", file=sys.stderr)


def _interrupted() -> int:
    return TERMINATED if is_terminated() else _INTERRUPTED


def entry() -> None:
    """Run the command line of this process; a terminal that lacks a character shows a `?`."""
    complete(parser)
    process.claim()
    try:
        with interrupted_by_sigterm():
            code = main() if _streams_are_ready() else _USAGE
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the answer is out
    except KeyboardInterrupt:
        code = _interrupted()
    quick_exit()
    sys.exit(code)


def _streams_are_ready() -> bool:
    """Prepare the streams, and say whether there is one for the answer.

    Without a stderr, progress and errors are not shown. Its number must not be free, or a file
    that is opened later gets what is written there.
    """
    if sys.stderr is None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
    if sys.stdout is None:
        print(
            "autobatch: error: stdout is closed, and there is nowhere to print the answer: send it "
            "to a file, or to /dev/null",
            file=sys.stderr,
        )
        return False
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    return True


def _let_go_of_stdout() -> None:
    """Let what is still to be written to stdout go nowhere, so that the process ends in peace."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
