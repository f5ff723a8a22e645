"""A process that predicts steps: tasks as lines of JSON on stdin, records on stdout.

An argument is a folder with the release of transformers to use, in front of what is installed.
"""

from __future__ import annotations

import gc
import json
import sys


def main() -> int:
    """Work until stdin ends; return the exit code."""
    sys.path[:0] = sys.argv[1:]
    from reports.accuracy.steps.predict import predict_step  # imports what lies in the folder
    from reports.common.worker import answers_alone, say

    answers = answers_alone()
    say(answers, ready=True)
    for line in sys.stdin:
        task = json.loads(line)
        for record in predict_step(task["step"], task["keys"]):
            say(answers, **record)
        gc.collect()
        say(answers, done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
