"""The worker's end of the pool: tasks are lines of JSON on stdin, answers lines on stdout."""

from __future__ import annotations

import json
import logging
import os
import warnings
from typing import TextIO

import torch


def answers_alone() -> TextIO:
    """Make the process quiet, and return where it answers; what libraries print goes to stderr."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def say(answers: TextIO, **record: object) -> None:
    """Answer with a record."""
    answers.write(json.dumps(record) + "\n")
    answers.flush()
