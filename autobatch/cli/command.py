"""How a command runs: its exit code, and errors as messages.

Invariant: this is the only place where errors become messages and exit codes; `entry_point` has
those of a process without a command. The answer goes to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence

from autobatch.cli.importing import require_importable_torch
from autobatch.cli.interrupted import tell_interrupt
from autobatch.cli.parser import parsed, parser
from autobatch.errors import AutobatchError, WorkloadError
from autobatch.support.exits import exits_reported
from autobatch.support.wording import ON_COMMAND_LINE

__all__ = ["run"]

_USAGE, _BROKEN_PIPE = 2, 141

_NOT_WRITTEN = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF))
"""What a stream answers that takes no more: a full disk, most of the time."""


def run(argv: Sequence[str] | None = None) -> int:
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
        has_study = getattr(arguments, "storage", None)
        return tell_interrupt("; the study keeps its finished trials" if has_study else "")
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


def _let_go_of_stdout() -> None:
    """Let what is still to be written to stdout go nowhere, so that the process ends in peace."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
