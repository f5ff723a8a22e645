"""A process that predicts: tasks as lines of JSON on stdin, records as lines of JSON on stdout."""

from __future__ import annotations

import gc
import json
import sys

from reports.accuracy.predict import predict
from reports.accuracy.tables import Run
from reports.common.worker import answers_alone, say


def main() -> int:
    """Work until stdin ends; return the exit code."""
    answers = answers_alone()
    say(answers, ready=True)
    for line in sys.stdin:
        task = json.loads(line)
        for record in predict(Run(**task["run"]), task["keys"]):
            say(answers, **record)
        gc.collect()
        say(answers, done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
