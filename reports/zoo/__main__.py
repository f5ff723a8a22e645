"""Plan the training steps of packages that people use, on the virtual GPU, and check the plans.

    python -m reports.zoo [--match GLOB] [--workers N] [--out DIR] [--retry] [--fresh]
                          [--time-limit S] [--list]
    python -m reports.zoo render [DIR]

DIR gets rows.jsonl (a run that was cut short goes on from there) and results.json of all that is in
rows.jsonl. `render` takes those of a finished DIR into this report's folder, and renews its README.

Exit code 0: every workload has a record; 1: workers do not start; 2: an option is not understood.
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
from reports.zoo.entries import Entry, entries, selected
from reports.zoo.results import is_right, write_results

WORKER = (sys.executable, "-m", "reports.zoo.worker")
JOURNAL = "rows.jsonl"
TIME_LIMIT_S = 300.0
MEMORY_LIMIT_BYTES = 8 * GIB
"""What runs on the CPU has its weights, gradients and optimizer state there."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["render"]:
        from reports.zoo.render import main as render  # needs no worker

        return render(words[1:])
    options = _parser().parse_args(words)
    known = entries()
    chosen = selected(known, options.match)
    if not chosen:
        print(f"nothing is called {options.match}", file=sys.stderr)
        return 2
    if options.list:
        for entry in chosen:
            print(f"{entry.area}: {entry.name}: {entry.what}; {', '.join(entry.packages) or '-'}")
        return 0
    out = output_folder(options.out)

    def work() -> str:
        records = try_workloads(
            chosen,
            out / JOURNAL,
            workers=options.workers,
            time_limit_s=options.time_limit,
            retry=options.retry,
            fresh=options.fresh,
        )
        return write_results(known, records, out)

    return exit_code_of(work, out, out / JOURNAL)


def try_workloads(
    chosen: Sequence[Entry],
    journal: Path,
    *,
    workers: int,
    time_limit_s: float = TIME_LIMIT_S,
    retry: bool = False,
    fresh: bool = False,
) -> dict[str, Record]:
    """Try what is not yet in the journal, and return all of its records by name.

    Args:
        chosen: to try.
        journal: a file; what it holds of other workloads stays.
        workers: processes at a time.
        time_limit_s: for one workload.
        retry: try again what is not right.
        fresh: try everything again.

    Raises:
        WorkersFailError: a worker ended before it was ready.
    """
    by_name = {entry.name: entry for entry in chosen}
    return run_resumable(
        [{"keys": [name], "name": name} for name in by_name],
        journal,
        command=WORKER,
        workers=workers,
        time_limit_s=time_limit_s,
        memory_limit_bytes=MEMORY_LIMIT_BYTES,
        again=lambda record: fresh or (retry and not is_right(record)),
        ended=lambda found: _ended(by_name[found["key"]], found),
        counts=lambda record: not is_right(record),
        counted="not right",
    )


def _ended(entry: Entry, found: Record) -> Record:
    """Return the record of a workload whose process was ended, or died."""
    return {
        "key": entry.name,
        "area": entry.area,
        "what": entry.what,
        "packages": dict.fromkeys(entry.packages),
        "outcome": "failed",
        "reason": found["error"],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports.zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--match", metavar="GLOB", help="names, areas or packages, such as 'peft'")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument("--out", type=Path, default=Path("zoo"), metavar="DIR", help="default: zoo")
    parser.add_argument("--retry", action="store_true", help="try again what is not right")
    parser.add_argument("--fresh", action="store_true", help="try everything again")
    parser.add_argument("--list", action="store_true", help="name the workloads, and run none")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=TIME_LIMIT_S,
        metavar="S",
        help=f"seconds for one workload, default: {TIME_LIMIT_S:.0f}",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
