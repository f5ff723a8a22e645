"""A process on the bench: rows as lines of JSON on stdin; for each, where its truth is.

Every row runs in a process of its own that is forked before CUDA begins, so that none finds what
another one has left, and libraries are imported once.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from autobatch.support.units import GIB
from reports.common.memory import resident_bytes
from reports.common.results import one_line
from reports.common.worker import answers_alone, say
from reports.fidelity.rows import Row

MEMORY_LIMIT_BYTES = 6 * GIB
_POLL_S = 0.05


def main() -> int:
    """Answer until stdin ends; return the exit code."""
    answers = answers_alone()
    for library in ("timm", "transformers", "torchvision"):
        with suppress(ImportError):
            importlib.import_module(library)
    importlib.import_module("reports.fidelity.training")
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if not child:
            os.environ["CARD_CUDNN_RNN_RESERVE"] = str(task["reserve_bytes"])
            _run(Row.of(task), Path(task["file"]))
            os._exit(0)
        say(answers, status=_waited(child))
    return 0


def _waited(child: int) -> int:
    """Wait for a child to end, and end it where it fills the memory of the machine."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        with suppress(OSError):
            if resident_bytes(child) > MEMORY_LIMIT_BYTES:  # fills are real on the bench
                os.kill(child, signal.SIGKILL)
        time.sleep(_POLL_S)


def _run(row: Row, file: Path) -> None:
    from reports.fidelity.training import train

    try:
        found = train(row)
    except BaseException as error:  # the parent goes on, whatever happens here
        traceback.print_exc()
        file.write_bytes(pickle.dumps(one_line(error)))
    else:
        file.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
