"""Compare predictions with PyTorch's CUDA code on a simulated runtime, allocation by allocation.

    python -m reports.fidelity [--library NAME] [--match GLOB] [--models N] [--rows N]
                               [--workers N] [--out DIR] [--retry] [--time-limit S]
    python -m reports.fidelity show ROW
    python -m reports.fidelity render [DIR]

DIR gets rows.jsonl (a run that was cut short goes on from there) and results.json. `show` runs one
row, such as "timm:vit_tiny_patch16_224 2 x 2 bf16 a100-40gb", and prints both sides around every
difference. `render` takes a finished DIR into this report's folder.

Exit code 0: every row has a record; 1: the bench does not run here; 2: an option is not understood.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

from autobatch.support.units import GIB
from reports.common.command_line import exit_code_of, output_folder, positive
from reports.common.journal import Record
from reports.common.resumable import run_resumable
from reports.fidelity.results import is_near
from reports.fidelity.rows import Row, rows
from reports.fidelity.subjects import LIBRARIES, names
from reports.fidelity.text import write_results
from tests.bench.card import reason_it_cannot_run

WORKER = (sys.executable, "-m", "reports.fidelity.worker")
JOURNAL = "rows.jsonl"
TIME_LIMIT_S = 180.0
MEMORY_LIMIT_BYTES = 8 * GIB
ROWS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["render"]:
        from reports.fidelity.render import main as render  # needs no bench

        return render(words[1:])
    if reason := reason_it_cannot_run():
        print(reason, file=sys.stderr)
        return 1
    if words[:1] == ["show"]:
        from reports.fidelity.show import main as show

        return show(words[1:])
    options = _parser().parse_args(words)
    chosen = [
        name for name in names(options.library) if fnmatch.fnmatchcase(name, options.match or "*")
    ]
    if options.models is not None:  # spread over all of them
        chosen = chosen[:: max(len(chosen) // options.models, 1)][: options.models]
    out = output_folder(options.out)

    def work() -> str:
        records = compare_rows(
            list(rows(chosen, options.rows)),
            out / JOURNAL,
            workers=options.workers,
            time_limit_s=options.time_limit,
            retry=options.retry,
        )
        return write_results(records.values(), out)

    return exit_code_of(work, out, out / JOURNAL)


def compare_rows(
    chosen: Sequence[Row],
    journal: Path,
    *,
    workers: int,
    time_limit_s: float = TIME_LIMIT_S,
    retry: bool = False,
) -> dict[str, Record]:
    """Compare what is not yet in the journal, and return all of its records by key.

    Args:
        chosen: to compare.
        journal: a file; what it holds of other rows stays.
        workers: pairs of processes at a time.
        time_limit_s: for one row.
        retry: compare again what failed or is not near.

    Raises:
        WorkersFailError: a worker ended before it was ready.
    """
    by_key = {row.key: row for row in chosen}
    return run_resumable(
        [row.task() for row in chosen],
        journal,
        command=WORKER,
        workers=workers,
        time_limit_s=time_limit_s,
        memory_limit_bytes=MEMORY_LIMIT_BYTES,
        again=lambda record: retry and not is_near(record) and record["outcome"] != "skipped",
        ended=lambda found: _ended(by_key[found["key"]], found),
        counts=lambda record: record["outcome"] == "compared" and not is_near(record),
        counted="beyond 0.05 %",
    )


def _ended(row: Row, found: Record) -> Record:
    """Return the record of a row whose process was ended, or died."""
    task = {name: value for name, value in row.task().items() if name != "keys"}
    return {"key": row.key, **task, "outcome": "failed", "reasons": {"worker": found["error"]}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports.fidelity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--library", action="append", choices=LIBRARIES, default=[])
    parser.add_argument("--match", metavar="GLOB", help="names, such as 'timm:vit_*'")
    parser.add_argument("--models", type=positive, metavar="N", help="so many, spread over all")
    parser.add_argument(
        "--rows", type=positive, default=ROWS, metavar="N", help=f"of each model, default: {ROWS}"
    )
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument("--out", type=Path, default=Path("fidelity"), metavar="DIR")
    parser.add_argument("--retry", action="store_true", help="again what is not near")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, metavar="S")
    return parser


if __name__ == "__main__":
    sys.exit(main())
