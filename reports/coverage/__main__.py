"""Predict every model of timm and every model type of transformers on the virtual GPU.

    python -m reports.coverage [--only timm|transformers] [--match GLOB] [--workers N] [--out DIR]
                               [--retry] [--fresh] [--time-limit S]
    python -m reports.coverage render [DIR]

DIR gets rows.jsonl (a run that was cut short goes on from there), coverage.csv, summary.json and
charts of all that is in rows.jsonl. `render` takes those of a finished DIR into this report's
folder, and renews its README.

Exit code 0: every subject has a record; 1: workers do not start; 2: an option cannot be understood.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from autobatch.support.units import GIB
from reports.common.command_line import exit_code_of, output_folder, positive
from reports.common.journal import Record
from reports.common.resumable import run_resumable
from reports.coverage.subjects import LIBRARIES, Subject, selected, subjects_of, tasks_of
from reports.coverage.summary import FAILED, PREDICTED, ended

WORKER = (sys.executable, "-m", "reports.coverage.worker")
JOURNAL = "rows.jsonl"
TIME_LIMIT_S = 300.0
MEMORY_LIMIT_BYTES = 4 * GIB
"""Well above the target of 1 GiB, so that what misses it has a figure."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["render"]:
        from reports.coverage.render import main as render  # needs no worker

        return render(words[1:])
    options = _parser().parse_args(words)
    known = [subject for library in LIBRARIES for subject in subjects_of(library)]
    chosen = selected(known, only=options.only, match=options.match)
    if not chosen:
        print(f"nothing is called {options.match}", file=sys.stderr)
        return 2
    out = output_folder(options.out)

    def work() -> str:
        records = try_subjects(
            chosen,
            out / JOURNAL,
            workers=options.workers,
            time_limit_s=options.time_limit,
            retry=options.retry,
            fresh=options.fresh,
        )
        from reports.coverage.results import write_results  # matplotlib loads after the work

        return write_results(known, records, out)

    return exit_code_of(work, out, out / JOURNAL)


def try_subjects(
    subjects: Sequence[Subject],
    journal: Path,
    *,
    workers: int,
    time_limit_s: float = TIME_LIMIT_S,
    retry: bool = False,
    fresh: bool = False,
) -> dict[str, Record]:
    """Try what is not yet in the journal, and return all of its records by key.

    Args:
        subjects: to try.
        journal: a file; what it holds of other subjects stays.
        workers: processes at a time.
        time_limit_s: for one subject.
        retry: try again what was not predicted.
        fresh: try everything again.

    Raises:
        WorkersFailError: a worker ended before it was ready.
    """
    return run_resumable(
        tasks_of(subjects),
        journal,
        command=WORKER,
        workers=workers,
        time_limit_s=time_limit_s,
        memory_limit_bytes=MEMORY_LIMIT_BYTES,
        again=lambda record: fresh or (retry and record["outcome"] != PREDICTED),
        ended=ended,
        counts=lambda record: record["outcome"] == FAILED,
        counted="failed",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports.coverage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=LIBRARIES, help="one library")
    parser.add_argument("--match", metavar="GLOB", help="names such as 'vit_*'")
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="default: 2")
    parser.add_argument(
        "--out", type=Path, default=Path("coverage"), metavar="DIR", help="default: coverage"
    )
    parser.add_argument("--retry", action="store_true", help="try again what was not predicted")
    parser.add_argument("--fresh", action="store_true", help="try everything again")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=TIME_LIMIT_S,
        metavar="S",
        help=f"seconds for one model, default: {TIME_LIMIT_S:.0f}",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
