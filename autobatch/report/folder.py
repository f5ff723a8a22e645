"""The report folder of a plan: for people, spreadsheets and slides.

Invariant: everything in it is derived from the plan, so it can be rendered again anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path

from autobatch.records.plan_json import write_plan
from autobatch.records.plan_record import PlanRecord
from autobatch.report import html, markdown, table
from autobatch.report.charts.files import write_charts
from autobatch.report.content import full_report
from autobatch.support.files import prepare_folder, write_text

__all__ = ["write_report"]


def write_report(plan: PlanRecord, folder: str | os.PathLike[str]) -> Path:
    """Write report.html, report.md, plan.json, the CSV tables and the charts into a folder.

    Returns:
        The path of report.html.

    Raises:
        FileError: the folder or a file in it cannot be written.
    """
    target = prepare_folder(folder)
    drawings = write_charts(plan, prepare_folder(target / "charts"))
    table.write_csv(plan, target)
    write_text(target / "plan.json", write_plan(plan))
    document = full_report(plan)
    write_text(target / "report.md", markdown.render(document))
    return write_text(target / "report.html", html.page(document, drawings))
