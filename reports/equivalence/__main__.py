"""Compare the verdicts of `check_equivalence` with gradients that plain PyTorch adds up.

    python -m reports.equivalence [--match GLOB] [--workers N] [--out DIR] [--retry]
                                  [--time-limit S]
    python -m reports.equivalence render [DIR]

DIR gets cases.jsonl (a run that was cut short goes on from there) and results.json. `render` takes
a finished DIR into this report's folder.

Exit code 0: no case is called equivalent that is not; 1: one is, or the workers do not start.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

from autobatch.support.units import GIB
from reports.common.command_line import exit_code_of, output_folder, positive
from reports.common.journal import Record, read_journal
from reports.common.resumable import run_resumable
from reports.equivalence.results import is_false, is_right, render, write_results
from reports.equivalence.subjects import CASES

WORKER = (sys.executable, "-m", "reports.equivalence.worker")
JOURNAL = "cases.jsonl"
TIME_LIMIT_S = 600.0
MEMORY_LIMIT_BYTES = 14 * GIB


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["render"]:
        render(Path(words[1] if len(words) > 1 else "equivalence"))
        return 0
    options = _parser().parse_args(words)
    chosen = [name for name in CASES if fnmatch.fnmatchcase(name, options.match)]
    out = output_folder(options.out)
    journal = out / JOURNAL

    def work() -> str:
        records = run_resumable(
            [{"keys": [name]} for name in chosen],
            journal,
            command=WORKER,
            workers=options.workers,
            time_limit_s=options.time_limit,
            memory_limit_bytes=MEMORY_LIMIT_BYTES,
            again=lambda record: options.retry and not is_right(record),
            ended=_ended,
            counts=lambda record: not is_right(record),
            counted="not right",
        )
        return write_results([records[name] for name in CASES if name in records], out)

    code = exit_code_of(work, out, journal)
    return code or int(any(map(is_false, read_journal(journal).values())))


def _ended(found: Record) -> Record:
    """Return the record of a case whose process was ended, or died."""
    case = CASES[found["key"]]
    known = {"key": case.name, "is_equivalent": case.is_equivalent, "why": case.why}
    return {**known, "outcome": "failed", "error": found["error"]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports.equivalence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--match", metavar="GLOB", default="*", help="names, such as 'loss: *'")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument("--out", type=Path, default=Path("equivalence"), metavar="DIR")
    parser.add_argument("--retry", action="store_true", help="again what is not right")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, metavar="S")
    return parser


if __name__ == "__main__":
    sys.exit(main())
