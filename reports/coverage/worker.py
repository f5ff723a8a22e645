"""A process that predicts subjects: tasks as lines of JSON on stdin, records on stdout.

Invariant: a figure of memory is that of one model. What models leave behind (modules of libraries,
caches of PyTorch) is got rid of by starting anew, in place, before the next task is asked for; the
pool sees one process.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from collections.abc import Iterable
from typing import TextIO

import torch
from torch import nn

import autobatch
from autobatch.support.units import MIB
from reports.common.worker import answers_alone, say
from reports.coverage.memory import resident_now_bytes
from reports.coverage.subjects import Subject
from reports.coverage.summary import GPU
from reports.coverage.trial import attempt

MODELS = 50
GROWTH_BYTES = 96 * MIB
"""After so many models, or so much more memory than after the first, the process starts anew."""

_AGAIN = "--again"


def main(arguments: list[str]) -> int:
    """Work until stdin ends; return the exit code."""
    answers = answers_alone()
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True  # tells of what is caught
    _warm_up()
    say(answers, **({"done": True} if _AGAIN in arguments else {"ready": True}))
    if work(sys.stdin, answers):
        os.dup2(answers.fileno(), 1)
        os.execv(sys.executable, [sys.executable, "-m", "reports.coverage.worker", _AGAIN])
    return 0


def work(tasks: Iterable[str], answers: TextIO) -> bool:
    """Do tasks until they end, or until it is time to start anew.

    Returns:
        Whether to start anew; the last task is not yet said to be done then. Who asks for another
        is ready for it, so the fresh process says so.
    """
    began_bytes: int | None = None
    for count, line in enumerate(tasks, start=1):
        task = json.loads(line)
        say(answers, **attempt(Subject(task["library"], task["name"])))
        gc.collect()
        held_bytes = resident_now_bytes() or 0
        began_bytes = began_bytes or held_bytes  # with the library, which the first model imports
        if count == MODELS or held_bytes > began_bytes + GROWTH_BYTES:
            return True
        say(answers, done=True)
    return False


def _warm_up() -> None:
    """Let the first model not pay for what PyTorch sets up at first use."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    autobatch.predict(model, micro_batch=2, gpu=GPU)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
