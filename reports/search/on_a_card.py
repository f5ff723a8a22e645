"""A process on the bench: one task as JSON in its argument, its record as JSON in a file.

    python -m reports.search.on_a_card TASK FILE

Invariant: the truth about a size shares nothing with the search: a plain training loop runs it.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import autobatch
from reports.common.results import one_line
from reports.search.finders import searched
from reports.search.subjects import TARGET, subject, truth


def ceiling(task: dict[str, Any]) -> dict[str, Any]:
    """Search a ceiling, proof included, and run both sides of it in a plain loop."""
    what = subject(task["model"], task["length"])
    started = time.perf_counter()
    plan = autobatch.tune(
        what.model,
        sample=what.sample,
        loss=what.loss,
        target=TARGET,
        autocast="bf16",
        prove=True,
    )
    seconds = time.perf_counter() - started
    found = plan.ceiling_at_least
    windows = [trial for trial in plan.trials if trial.accumulation_steps == 2]
    before = []
    for trial in windows:  # what was executed until both n and n + 1 were known
        if {found, found + 1} <= set(before):
            break
        before.append(trial.micro_batch)
    search = [size for size in before if size != found + 1]
    ooms = sum(trial.oom for trial in windows if trial.micro_batch in search)
    sides = [truth(what, size, 2) for size in (found, found + 1)]
    return {
        "budget_bytes": plan.budget_bytes,
        "ceiling": plan.ceiling,
        "at_least": found,
        "method": plan.method,
        "search": search,
        "ooms": ooms,
        "proven": plan.proven,
        "plain": sides,
        "seconds": round(seconds, 1),
    }


def main(arguments: list[str]) -> int:
    """Run a task; return the exit code."""
    warnings.simplefilter("ignore")
    task = json.loads(arguments[0])
    try:
        found = ceiling(task) if task["table"] == "ceilings" else searched(task)
    except Exception as error:
        found = {"error": one_line(error)}
    Path(arguments[1]).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
