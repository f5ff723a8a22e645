"""The report folder of a plan: for people, spreadsheets and slides.

Invariant: everything in it is derived from the plan, so it can be rendered again anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path

from autobatch.records.plan_json import write_plan
from autobatch.records.plan_record import PlanRecord
from autobatch.report import drawings, html, markdown, rows
from autobatch.report.content import full_report
from autobatch.report.own_files import report_folder
from autobatch.support.files import write_text

__all__ = ["write_charts", "write_report"]


def write_report(plan: PlanRecord, folder: str | os.PathLike[str]) -> Path:
    """Write plan.json, report.html, report.md, the CSV tables and the charts into a folder.

    The plan comes first, because all else can be made of it again.

    Returns:
        The path of report.html.

    Raises:
        FileError: the folder or a file in it cannot be written, or would be another's.
    """
    with report_folder("plan", folder) as (target, charts):
        write_text(target / "plan.json", write_plan(plan))
        page = write_text(target / "report.html", html.plan_page(plan))
        write_text(target / "report.md", markdown.render(full_report(plan)))
        rows.write_csv(plan, target)
        write_charts(plan, charts)
    return page


def write_charts(plan: PlanRecord, folder: Path) -> None:
    """Draw every chart as NAME.svg.

    Raises:
        FileError: a file cannot be written.
    """
    for draw in (drawings.memory, drawings.breakdown, drawings.timeline):
        write_text(folder / f"{draw.__name__}.svg", draw(plan))
