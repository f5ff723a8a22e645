"""A process that predicts: tasks as lines of JSON on stdin, records as lines of JSON on stdout."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import warnings

import torch

from reports.accuracy.predict import predict
from reports.accuracy.tables import Run


def main() -> int:
    """Work until stdin ends; return the exit code."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    # what libraries print goes to stderr
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**record: object) -> None:
        answers.write(json.dumps(record) + "\n")
        answers.flush()

    say(ready=True)
    for line in sys.stdin:
        task = json.loads(line)
        for record in predict(Run(**task["run"]), task["keys"]):
            say(**record)
        gc.collect()
        say(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
