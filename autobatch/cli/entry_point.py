"""Where a command begins and ends: exit codes, and errors as messages.

Invariant: this is the only place where errors become messages and exit codes. The answer goes to
stdout, progress and errors to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence

from autobatch.cli.completion import complete
from autobatch.cli.parser import parsed, parser
from autobatch.errors import AutobatchError, WorkloadError
from autobatch.support import process
from autobatch.support.collection import quick_exit
from autobatch.support.exits import exits_reported
from autobatch.support.wording import ON_COMMAND_LINE

__all__ = ["entry", "main"]

_BROKEN_PIPE, _INTERRUPTED = 141, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done, 1: the workload failed, or `check` found the gradients different, 2: usage, 3: nothing
    fits, 130: interrupted.
    """
    given = sys.argv[1:] if argv is None else argv
    if not given:
        parser().print_help(sys.stderr)
        return 0
    import shlex

    reader = ON_COMMAND_LINE.set(True)
    debug = "--debug" in given
    try:
        try:
            arguments = parsed(given)
        except SystemExit as exit_:  # argparse has printed its message
            return exit_.code if isinstance(exit_.code, int) else 2
        debug = arguments.debug
        arguments.command = shlex.join(["autobatch", *given])
        with exits_reported("the workload"):
            code: int | None = arguments.run(arguments)
        sys.stdout.flush()
    except AutobatchError as error:
        if debug:
            traceback.print_exc()
        elif isinstance(error, WorkloadError) and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"autobatch: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        return _INTERRUPTED
    finally:
        ON_COMMAND_LINE.reset(reader)
    return code or 0


def entry() -> None:
    """Run the command line of this process; a terminal that lacks a character shows a `?`."""
    complete(parser)
    process.claim()
    try:
        _unicode_or_less()
        code = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the answer is out
    except KeyboardInterrupt:
        code = _INTERRUPTED
    quick_exit()
    sys.exit(code)


def _unicode_or_less() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
