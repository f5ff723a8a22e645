"""Predict every row of a table of measured steps, and account for the errors."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reports.accuracy.steps.configuration import Case, IncompleteError, Step, StepRow
from reports.accuracy.steps.readers import step_of
from reports.common.command_line import progress_bar
from reports.common.journal import Record, append, read_journal
from reports.common.pool import run_tasks

WORKER = (sys.executable, "-m", "reports.accuracy.steps.worker")
JOURNAL = "rows.jsonl"
MEMORY_LIMIT_BYTES = 4 * 2**30


def cases_of(records: Iterable[Mapping[str, str]]) -> list[Case]:
    """Return every row with its step, or with what is missing."""
    cases = []
    for record in records:
        row = StepRow(values=record)
        try:
            cases.append(Case(row=row, step=step_of(row)))
        except IncompleteError as error:
            cases.append(Case(row=row, cause=f"configuration incomplete: {error}"))
    return cases


def releases_in(folder: Path | None) -> dict[str, Path]:
    """Return the folders of pinned releases by their first two numbers.

    Each is what `pip install --no-deps --target FOLDER/4.46.3 transformers==4.46.3 …` makes.
    """
    if folder is None:
        return {}
    found = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"(\d+\.\d+)\.\d+", path.name)
        if match and (path / "transformers").is_dir():
            found[match[1]] = path
    return found


def predict_cases(
    cases: Sequence[Case],
    out: Path,
    releases: Mapping[str, Path],
    *,
    workers: int,
    time_limit_s: float,
    retry: bool = False,
    worker: Sequence[str] = WORKER,
) -> dict[str, Record]:
    """Predict what is not in the folder's journal yet, and return every record by key."""
    journal = out / JOURNAL
    known = read_journal(journal)
    if retry:
        known = {key: record for key, record in known.items() if "error" not in record}
    steps = {case.step.key: case.step for case in cases if case.step is not None}
    waiting: dict[str, list[Step]] = {}
    for key, step in steps.items():
        if key not in known:
            waiting.setdefault(step.transformers, []).append(step)
    with progress_bar() as bar:
        shown = bar.add_task("steps", total=len(steps), completed=len(steps.keys() & known.keys()))

        def record(found: Record) -> None:
            append(journal, found)
            known[found["key"]] = found
            bar.advance(shown)

        for release, members in waiting.items():
            if release and release not in releases:
                for step in members:  # not in the journal: another run may have the release
                    known[step.key] = {"key": step.key, "error": _missing(release)}
                    bar.advance(shown)
                continue
            run_tasks(
                [{"step": step.as_record(), "keys": {step.key: 0}} for step in members],
                command=[*worker, *([str(releases[release])] if release else [])],
                workers=workers,
                record=record,
                time_limit_s=time_limit_s,
                memory_limit_bytes=MEMORY_LIMIT_BYTES,
            )
    return {key: known[key] for key in steps}


def _missing(release: str) -> str:
    return (
        f"configuration incomplete: needs the modelling code of transformers {release}, which "
        "--pinned has no folder of"
    )


def main(records: Sequence[Mapping[str, str]], out: Path, options: Any, words: str) -> str:
    """Predict a table's rows, write the results into a folder, and return the summary."""
    cases = cases_of(records)
    if options.fresh:
        (out / JOURNAL).unlink(missing_ok=True)
    found = predict_cases(
        cases,
        out,
        releases_in(options.pinned),
        workers=options.workers,
        time_limit_s=options.time_limit,
        retry=options.retry,
    )
    from reports.accuracy.steps.results import write_results  # matplotlib loads after the work

    return write_results(cases, found, out, words=words)
