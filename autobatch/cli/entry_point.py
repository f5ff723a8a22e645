"""Where the process of a command begins and ends.

Invariant: importing this module takes next to no time, and everything else is imported where a
Ctrl-C is already told in a line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["entry", "main"]

_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from autobatch.cli.command import run

    return run(argv)


def entry() -> None:
    """Run the command line of this process; a terminal that lacks a character shows a `?`."""
    try:
        code = _run()
    except KeyboardInterrupt:  # as the command was imported, or once it had ended
        from autobatch.cli.interrupted import tell_interrupt

        code = tell_interrupt()
    from autobatch.support.collection import quick_exit

    quick_exit()
    sys.exit(code)


def _run() -> int:
    import signal

    from autobatch.cli.completion import complete
    from autobatch.cli.parser import parser
    from autobatch.support import process
    from autobatch.support.interrupts import interrupted_by_sigterm

    complete(parser)
    process.claim()
    with interrupted_by_sigterm():
        code = main() if _streams_are_ready() else _USAGE
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the answer is out
    return code


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
