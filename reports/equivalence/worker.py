"""A process that checks cases: tasks as lines of JSON on stdin, records on stdout."""

from __future__ import annotations

import json
import sys
import time
import traceback

from autobatch.equivalence.check import check_equivalence
from reports.common.journal import Record
from reports.common.results import one_line
from reports.common.worker import answers_alone, say
from reports.equivalence.cases import Case
from reports.equivalence.reference import reference
from reports.equivalence.subjects import CASES


def main() -> int:
    """Check cases until stdin ends; return the exit code."""
    answers = answers_alone()
    say(answers, ready=True)
    for line in sys.stdin:
        case = CASES[json.loads(line)["keys"][0]]
        say(answers, **checked(case))
        say(answers, done=True)
    return 0


def checked(case: Case) -> Record:
    """Return the record of a case: its verdict, or why there is none."""
    record: Record = {"key": case.name, "is_equivalent": case.is_equivalent, "why": case.why}
    try:
        model, batch, loss = case.build()
        started = time.process_time()
        result = check_equivalence(model, batch, loss=loss)
        seconds = time.process_time() - started
        found = reference(case)
    except Exception as error:
        traceback.print_exc()
        return {**record, "outcome": "failed", "error": one_line(error)}
    return {
        **record,
        "outcome": "checked",
        "equivalent": result.equivalent,
        "culprits": [[each.kind, list(each.where[:3])] for each in result.culprits],
        "difference": result.difference,
        "held_difference": result.held_difference,
        "dtype": result.dtype,
        "notes": len(result.notes),
        "reference": found,
        "cpu_seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
