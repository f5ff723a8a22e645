"""Tasks whose records are kept as they come, so that a run that was cut short goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.progress import TextColumn

from reports.common.command_line import progress_bar
from reports.common.journal import Record, append, read_journal
from reports.common.pool import run_tasks


def run_resumable(
    tasks: Sequence[Record],
    journal: Path,
    *,
    command: Sequence[str],
    workers: int,
    time_limit_s: float,
    memory_limit_bytes: int,
    again: Callable[[Record], bool],
    ended: Callable[[Record], Record],
    counts: Callable[[Record], bool],
    counted: str,
) -> dict[str, Record]:
    """Run the tasks that have no record in the journal, and return all of its records by key.

    Args:
        tasks: of workers, each with the one key of its record in `keys`.
        journal: a file; what it holds of other tasks stays.
        command: starts a worker.
        workers: processes at a time.
        time_limit_s, memory_limit_bytes: for one task.
        again: whether a task with this record runs once more.
        ended: completes the record of a task whose worker was ended or died.
        counts: whether the progress counts a record as ...
        counted: ... this, such as "failed".

    Raises:
        WorkersFailError: a worker ended before it was ready.
    """
    known = read_journal(journal)
    keys = {task["keys"][0] for task in tasks}
    done = {key for key in keys & known.keys() if not again(known[key])}
    with progress_bar(TextColumn("{task.fields[number]} " + counted)) as bar:
        number = sum(counts(known[key]) for key in done)
        shown = bar.add_task("records", total=len(keys), completed=len(done), number=number)

        def record(found: Record) -> None:
            nonlocal number
            found = found if "outcome" in found else ended(found)
            append(journal, found)
            known[found["key"]] = found
            number += counts(found)
            bar.update(shown, advance=1, number=number)

        run_tasks(
            [task for task in tasks if task["keys"][0] not in done],
            command=command,
            workers=workers,
            record=record,
            time_limit_s=time_limit_s,
            memory_limit_bytes=memory_limit_bytes,
        )
    return known
