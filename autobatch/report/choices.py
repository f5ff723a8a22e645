"""The report folders of comparisons and frontiers: a page, Markdown, JSON, a table, a chart.

Invariant: everything in them is derived from the record.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from autobatch.records.comparison import ComparisonRecord, FrontierRecord, write_record
from autobatch.report import html, markdown, table
from autobatch.report.charts.choices import (
    comparison_chart,
    draw_comparison,
    draw_frontier,
    frontier_chart,
)
from autobatch.report.charts.frame import save, style
from autobatch.report.comparison import comparison_document, frontier_document
from autobatch.report.document import Document
from autobatch.report.own_files import report_folder
from autobatch.support.files import write_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["write_comparison", "write_frontier"]


def write_comparison(compared: ComparisonRecord, folder: str | os.PathLike[str]) -> Path:
    """Write report.html, report.md, comparison.json, comparison.csv and the chart into a folder.

    Returns:
        The path of report.html.

    Raises:
        FileError: the folder or a file in it cannot be written.
    """
    chart = comparison_chart(compared)
    with style():
        figures = {"comparison": draw_comparison(chart)} if chart.bars else {}
        return _write(
            "comparison",
            write_record(ComparisonRecord, compared),
            table.comparison(compared),
            comparison_document(compared, charts=True),
            figures,
            folder,
        )


def write_frontier(found: FrontierRecord, folder: str | os.PathLike[str]) -> Path:
    """Write report.html, report.md, frontier.json, frontier.csv and the chart into a folder.

    Returns:
        The path of report.html.

    Raises:
        FileError: the folder or a file in it cannot be written.
    """
    chart = frontier_chart(found)
    with style():
        figures = {"frontier": draw_frontier(chart)} if chart.ceilings else {}
        return _write(
            "frontier",
            write_record(FrontierRecord, found),
            table.frontier(found),
            frontier_document(found, charts=True),
            figures,
            folder,
        )


def _write(
    name: Literal["comparison", "frontier"],
    json: str,
    frame: pd.DataFrame,
    document: Document,
    figures: Mapping[str, Figure],
    folder: str | os.PathLike[str],
) -> Path:
    with report_folder(name, folder, has_charts=bool(figures)) as (target, charts):
        write_text(target / f"{name}.json", json)
        drawings = {title: save(figure, charts, title) for title, figure in figures.items()}
        write_text(target / f"{name}.csv", frame.to_csv(index=False))
        write_text(target / "report.md", markdown.render(document))
        return write_text(target / "report.html", html.page(document, drawings))
