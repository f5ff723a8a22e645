"""Lay estimates of throughput beside published ones.

    python -m reports.throughput [--match GLOB] [--out DIR]
    python -m reports.throughput fit [DIR]
    python -m reports.throughput render [DIR]

DIR gets works/ (what each row was counted to do; a run that was cut short goes on from there) and
results.json. `fit` prints the constants that fit the first half of a finished DIR best, `render`
takes it into this report's folder.

Exit code 0: the estimates of the rows that nothing was fitted to are in the published order (rank
correlation of at least 0.9); 1: they are not.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from reports.common.command_line import output_folder
from reports.throughput.count import counted
from reports.throughput.fit import fitted
from reports.throughput.results import RESULTS, render, write_results
from reports.throughput.rows import read_rows
from reports.throughput.score import scored

LEAST_CORRELATION = 0.9


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    folder = Path(words[1] if len(words) > 1 else "throughput")
    if words[:1] == ["render"]:
        render(folder)
        return 0
    if words[:1] == ["fit"]:
        rows = [row for row in read_rows() if row.half == "fitted"]
        found = fitted(counted(rows, output_folder(folder)))
        print("\n".join(f"{name}: {share:.2f}" for name, share in found.figures().items()))
        return 0
    options = _parser().parse_args(words)
    chosen = [row for row in read_rows() if fnmatch.fnmatchcase(row.key, options.match)]
    out = output_folder(options.out)
    works = counted(chosen, out)
    print(write_results([scored(row, work) for row, work in works], out))
    judged = json.loads((out / RESULTS).read_text())["held out"].get("all", {})
    correlation = judged.get("spearman")
    return int(correlation is None or correlation < LEAST_CORRELATION)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--match", metavar="GLOB", default="*", help="rows, such as 'timm nchw *'")
    parser.add_argument("--out", type=Path, default=Path("throughput"), metavar="DIR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
