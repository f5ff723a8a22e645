"""What is said of a sweep: the fastest configuration, the front, and what became of the others.

Invariant: every time says that it is an estimate or measured, every size that it was simulated or
measured.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from autobatch.records.sweep import SweepRecord, SweepTrial
from autobatch.report.document import (
    Chart,
    Code,
    ContentBlock,
    Document,
    Facts,
    Paragraph,
    Section,
    Table,
    printable,
    told_sections,
)
from autobatch.support.units import format_bytes, format_seconds
from autobatch.support.wording import count

__all__ = ["sweep_document", "sweep_summary", "write_sweep"]

_FRONT_ROWS = 12
"""Rows of the front that one screen shows."""

_REASON = 160
"""Characters of a reason that one screen shows."""

_CHART = Chart(
    "pareto",
    "Seconds of a training window against bytes reserved: every configuration that finished, and "
    "the front of those that no other one beats in both.",
)


def sweep_summary(record: SweepRecord) -> Document:
    """Return a sweep on one screen: the fastest, its code, the front, what was tried."""
    best = record.best
    return Document(
        title=f"fastest: {printable(best.label)}, micro-batch {best.micro_batch:,}",
        subtitle=f"{printable(record.model)} on {printable(record.gpu)}",
        sections=(
            Section("", (_facts(record),)),
            *_code(record),
            Section(_front_title(record), (_front(record, _FRONT_ROWS), *_more(record))),
            *told_sections(_warnings(record), _notes(record)),
        ),
    )


def sweep_document(record: SweepRecord) -> Document:
    """Return the whole report: the summary, the chart, the whole front and every trial."""
    head = sweep_summary(record)
    return Document(
        title=head.title,
        subtitle=head.subtitle,
        sections=(
            head.sections[0],
            *_code(record),
            Section("Speed against memory", (_CHART,)),
            Section(_front_title(record), (_front(record, None), *_starred(record.front))),
            *told_sections(_warnings(record), _notes(record)),
            Section(
                f"All {count(len(record.trials), 'trial')}, which are in trials.csv too",
                (_trials(record.trials),),
                is_folded=True,
            ),
        ),
    )


def write_sweep(
    record: SweepRecord, folder: str | os.PathLike[str], files: Mapping[str, str]
) -> Path:
    """Write report.html, report.md, trials.csv, the chart and further files into a folder.

    Args:
        record: of the sweep.
        folder: made where it is missing.
        files: text by name.

    Returns:
        The path of report.html.

    Raises:
        FileError: the folder or a file in it cannot be written.
    """
    from autobatch.report import html, markdown
    from autobatch.report.charts.frame import save, style
    from autobatch.report.charts.pareto import draw_pareto, pareto_chart
    from autobatch.report.own_files import report_folder
    from autobatch.report.table import sweep_trials
    from autobatch.support.files import write_text

    with report_folder("sweep", folder) as (target, charts), style():
        for name, text in files.items():
            write_text(target / name, text)
        drawing = save(draw_pareto(pareto_chart(record)), charts, _CHART.name)
        write_text(target / "trials.csv", sweep_trials(record).to_csv(index=False))
        document = sweep_document(record)
        write_text(target / "report.md", markdown.render(document))
        return write_text(target / "report.html", html.page(document, {_CHART.name: drawing}))


def _facts(record: SweepRecord) -> Facts:
    best = record.best
    ranks = "" if record.world_size == 1 else f" on each of {record.world_size:,} GPUs"
    pairs = [
        (
            "update",
            f"{count(record.target, 'sample')}: micro-batch {best.micro_batch:,}, "
            f"{count(best.accumulation_steps, 'accumulation step')}{ranks}",
        ),
        ("window", f"{_seconds(best)} ({record.time}){_gain(record)}"),
        (
            "reserved",
            f"{_reserved(best)} ({record.memory}) of {format_bytes(record.budget_bytes)}",
        ),
        ("tried", _tried(record)),
    ]
    if record.storage is not None:
        pairs.append(("study", f"{printable(record.study)} in {printable(record.storage)}"))
    return Facts(tuple(pairs))


def _gain(record: SweepRecord) -> str:
    """Say how much faster the best is than the run as it is, where that was tried."""
    best, unchanged = record.best, record.as_it_is
    if not any(trial.is_as_it_is for trial in record.trials):
        return ""
    if unchanged is None:
        return "; as it is, nothing that was tried fits"
    assert best.seconds is not None and unchanged.seconds is not None
    if unchanged == best:
        return ""
    share = 1 - best.seconds / unchanged.seconds
    less = f"{share:.0%} less than" if share >= 0.005 else "no less than"
    return (
        f", {less} as it is at its fastest, micro-batch {unchanged.micro_batch:,} "
        f"({_seconds(unchanged)}, {_reserved(unchanged)})"
    )


def _tried(record: SweepRecord) -> str:
    how = "configurations" if record.configurations is None else "configurations, the whole space"
    if record.left:
        how = f"of {record.configurations:,} configurations, and {record.left:,} not looked at"
    parts = [f"{record.count('finished'):,} finished"]
    for outcome, words in (
        ("does not fit", "do not fit"),
        ("cannot be had", "cannot be had"),
        ("failed", "failed"),
        ("pruned", "pruned without a run"),
    ):
        if number := record.count(outcome):  # type: ignore[arg-type]
            parts.append(f"{number:,} {words}")
    return (
        f"{len(record.trials):,} {how}: {', '.join(parts)}; {count(record.executions, 'run')} on "
        f"the {'simulated ' if record.memory == 'simulated' else ''}card, "
        f"{format_seconds(record.seconds)}"
    )


def _code(record: SweepRecord) -> tuple[Section, ...]:
    """Return the lines that make the fastest configuration of the run as it is."""
    changes = record.best.changes
    blocks: list[ContentBlock] = []
    for lever, value in changes.items():
        label = f"{lever}: {value}"
        if label in record.code:
            text = record.code[label]
            blocks += [
                Paragraph(printable(label)),
                Code(text if text.endswith("\n") else f"{text}\n"),
            ]
        else:
            blocks.append(Paragraph(f"{printable(label)}: by your own lever"))
    return (Section("What to change", tuple(blocks)),) if blocks else ()


def _front_title(record: SweepRecord) -> str:
    return f"Front of speed ({record.time}) against memory ({record.memory})"


def _front(record: SweepRecord, most: int | None) -> Table:
    rows = [
        (
            _seconds(trial),
            _reserved(trial),
            f"{trial.micro_batch:,}",
            f"{trial.accumulation_steps:,}",
            printable(trial.label) + (" *" if trial.changes_numerics else ""),
        )
        for trial in record.front[:most]
    ]
    columns = ("window", "reserved", "micro-batch", "steps", "changes")
    return Table(columns, "rrrrl", tuple(rows))


def _more(record: SweepRecord) -> tuple[ContentBlock, ...]:
    starred = _starred(record.front[:_FRONT_ROWS])
    if (left := len(record.front) - _FRONT_ROWS) > 0:
        more = f"{left} more of the front are slower and smaller; the report has them."
        return (Paragraph(more), *starred)
    return starred


def _starred(shown: Sequence[SweepTrial]) -> tuple[ContentBlock, ...]:
    """Say what the star of some rows means, where one has it."""
    if not any(trial.changes_numerics for trial in shown):
        return ()
    return (Paragraph("* training computes something else than as it is."),)


def _trials(trials: Sequence[SweepTrial]) -> Table:
    rows = [
        (
            str(trial.number),
            printable(trial.label),
            f"{trial.micro_batch:,}",
            _seconds(trial),
            _reserved(trial),
            str(trial.executions),
            trial.outcome + (f": {printable(trial.reason)}" if trial.reason else ""),
        )
        for trial in trials
    ]
    columns = ("trial", "changes", "micro-batch", "window", "reserved", "runs", "outcome")
    return Table(columns, "rlrrrrl", tuple(rows))


def _warnings(record: SweepRecord) -> list[str]:
    warnings = list(record.warnings)
    if record.best.changes_numerics:
        warnings.append(
            "the fastest configuration trains with other numbers than the run as it is: compare "
            "a short run of both before you rely on it"
        )
    failed = [trial for trial in record.trials if trial.outcome == "failed"]
    if failed:
        one = failed[0]
        warnings.append(
            f"{count(len(failed), 'configuration')} failed, such as {one.label} at micro-batch "
            f"{one.micro_batch:,}: {textwrap.shorten(one.reason or '', _REASON, placeholder=' …')}"
        )
    return warnings


def _notes(record: SweepRecord) -> list[str]:
    if not record.left:
        return list(record.notes)
    return [
        *record.notes,
        "not all configurations were looked at: the same sweep with more time or trials goes on "
        "from here" + ("" if record.storage else ", where it has a storage"),
    ]


def _seconds(trial: SweepTrial) -> str:
    return "-" if trial.seconds is None else format_seconds(trial.seconds)


def _reserved(trial: SweepTrial) -> str:
    return "-" if trial.reserved_bytes is None else format_bytes(trial.reserved_bytes)
