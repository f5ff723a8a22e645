"""A process that tries workloads: tasks as lines of JSON on stdin, records on stdout.

Invariant: each workload finds a process that no other one has been in; libraries change PyTorch as
they are imported.
"""

from __future__ import annotations

import json
import os
import sys

from reports.common.worker import answers_alone, say
from reports.zoo.entries import entries
from reports.zoo.trial import attempt

_AGAIN = "--again"


def main(arguments: list[str]) -> int:
    """Try one workload, then start anew in place; return the exit code when stdin ends."""
    answers = answers_alone()
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true", "TOKENIZERS_PARALLELISM": "0"}
    say(answers, **({"done": True} if _AGAIN in arguments else {"ready": True}))
    line = _line()
    if line:
        say(answers, **attempt(entries()[json.loads(line)["name"]]))
        os.dup2(answers.fileno(), 1)
        os.execv(sys.executable, [sys.executable, "-m", "reports.zoo.worker", _AGAIN])
    return 0


def _line() -> bytes:
    """Read a line of stdin and nothing after it, which is for the process that comes next."""
    line = b""
    while not line.endswith(b"\n"):
        character = os.read(0, 1)
        if not character:
            break
        line += character
    return line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
