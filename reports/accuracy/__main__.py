"""Predict every row of a table of measured peaks, and account for the errors.

    python -m reports.accuracy TABLE.csv [--gpu NAME] [--optimizer NAME] [--precision P]
                               [--context SIZE] [--out DIR] [--workers N] [--rows N]
                               [--retry] [--fresh]
    python -m reports.accuracy render [DIR ...]

The kind of the table is recognised by its columns, and gives the defaults:

  columns                                     kind        GPU         optimizer     context
  model, batch, nvidia_smi_peak_mib, usable   timm-peaks  a100-40gb   sgd-momentum  1775MiB
  model, train_batch_size, train_img_size     max-batch   rtx-3090    sgd-momentum  the GPU's
  gpu, total_gpu_bytes, model, batch,         xmem        the row's   the row's     0
    optimizer, ground_nvml_bytes
  set, source, model, config, measured_gib,   steps       the row's   the row's     none
    meaning, ...

Precision is fp32, for max-batch fp16 (autocast with a GradScaler). A predicted peak is what the
simulated allocator reserves plus the context, the same for every row that shares a GPU. Columns of
the table win over options; rows marked as not usable are left out.

Steps are figures of PyTorch's own counters, so that nothing is added to them. Their modelling code
is that of the release of transformers that a row names: `--pinned DIR` has a folder for each, such
as DIR/4.46.3, made by `pip install --no-deps --target DIR/4.46.3 transformers==4.46.3 ...`.

DIR gets rows.jsonl (the predictions; a run that was cut short goes on from there), errors.csv,
summary.json, predicted-against-measured.{png,svg} and error-by-family.{png,svg}. `render` takes the
summaries and the second chart of finished DIRs into this report's README.

Exit code 0: every row has a prediction or a cause; 1: workers do not start; 2: the table or an
option cannot be understood.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from autobatch.errors import AutobatchError
from autobatch.gpus.catalogue import find_gpu
from autobatch.support.units import parse_bytes
from reports.accuracy.steps.configuration import is_table_of_steps
from reports.accuracy.tables import (
    Kind,
    Row,
    Settings,
    TableError,
    read_csv,
    read_records,
    rows_of,
    sample,
    tasks_of,
)
from reports.common.command_line import exit_code_of, output_folder, positive, progress_bar
from reports.common.journal import Record, append, read_journal
from reports.common.pool import TIME_LIMIT_S, run_tasks

WORKER = (sys.executable, "-m", "reports.accuracy.worker")
OPTIMIZERS = ("sgd", "sgd-momentum", "adam", "adamw", "rmsprop", "adagrad", "adafactor")
JOURNAL = "rows.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["render"]:
        from reports.accuracy.render import main as render  # needs no table

        return render(words[1:])
    parser = _parser()
    options = parser.parse_args(words)
    try:
        columns, records = read_csv(options.table)
        if is_table_of_steps(columns):
            return _steps(records, options)
        kind, records = read_records(options.table)
        settings = _settings(kind, options)
        rows = sample(rows_of(kind, records, settings), options.rows)
    except (TableError, AutobatchError) as error:
        print(error, file=sys.stderr)
        return 2
    out = output_folder(options.out or Path("accuracy") / options.table.stem)
    if options.fresh:
        (out / JOURNAL).unlink(missing_ok=True)

    def work() -> str:
        found = predict_rows(
            rows,
            out,
            workers=options.workers,
            command=WORKER,
            time_limit_s=options.time_limit,
            retry=options.retry,
        )
        # pandas and matplotlib load after the work
        from reports.accuracy.results import write_results

        return write_results(kind, rows, found, settings, out, words=_words(options))

    return exit_code_of(work, out, out / JOURNAL)


def _steps(records: Sequence[Record], options: argparse.Namespace) -> int:
    """Predict a table of measured steps."""
    from reports.accuracy.steps import command

    out = output_folder(options.out or Path("accuracy") / options.table.stem)
    return exit_code_of(
        lambda: command.main(records, out, options, _words(options)), out, out / JOURNAL
    )


def predict_rows(
    rows: Sequence[Row],
    out: Path,
    *,
    workers: int,
    command: Sequence[str],
    time_limit_s: float = TIME_LIMIT_S,
    retry: bool = False,
) -> dict[str, Record]:
    """Predict what is not yet in the folder's journal, and return every record by key."""
    journal = out / JOURNAL
    known = read_journal(journal)
    if retry:
        known = {key: record for key, record in known.items() if "error" not in record}
    keys = {row.key for row in rows}
    tasks = tasks_of(rows, done=known)
    with progress_bar() as bar:
        shown = bar.add_task("rows", total=len(keys), completed=len(keys & known.keys()))

        def record(found: Record) -> None:
            append(journal, found)
            known[found["key"]] = found
            bar.advance(shown)

        run_tasks(tasks, command=command, workers=workers, record=record, time_limit_s=time_limit_s)
    return {key: known[key] for key in keys}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reports.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", type=Path, metavar="TABLE.csv", help="measured peaks")
    parser.add_argument("--gpu", metavar="NAME", help="a name of `autobatch gpus`")
    parser.add_argument("--optimizer", choices=OPTIMIZERS)
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"))
    parser.add_argument(
        "--context", metavar="SIZE", help="memory outside of the allocator, such as 1775MiB, or 0"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: accuracy/TABLE")
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="default: 2")
    parser.add_argument("--rows", type=positive, metavar="N", help="draw N rows, always the same")
    parser.add_argument(
        "--pinned", type=Path, metavar="DIR", help="releases of transformers, a folder for each"
    )
    parser.add_argument("--retry", action="store_true", help="try again what had no prediction")
    parser.add_argument("--fresh", action="store_true", help="predict everything anew")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=TIME_LIMIT_S,
        metavar="S",
        help=f"seconds for one model, default: {TIME_LIMIT_S:.0f}",
    )
    return parser


def _settings(kind: Kind, options: argparse.Namespace) -> Settings:
    if options.gpu:
        find_gpu(options.gpu)
    context_bytes = kind.context_bytes
    if options.context is not None:
        context_bytes = 0 if options.context.strip("0") == "" else parse_bytes(options.context)
    return Settings(
        gpu=options.gpu or kind.gpu,
        optimizer=options.optimizer or kind.optimizer,
        precision=options.precision or kind.precision,
        context_bytes=context_bytes,
    )


def _words(options: argparse.Namespace) -> str:
    """Return the command that gives the same figures: the table by its name, no folder of ours."""
    named = ("gpu", "optimizer", "precision", "context", "rows")
    given = {name: getattr(options, name) for name in named}
    shown = [f"--{name} {value}" for name, value in given.items() if value is not None]
    return " ".join(["python -m reports.accuracy", options.table.name, *shown])


if __name__ == "__main__":
    sys.exit(main())
