"""All charts of a plan, as files."""

from __future__ import annotations

from pathlib import Path

from autobatch.records.plan_record import PlanRecord
from autobatch.report.charts.breakdown import breakdown_chart, draw_breakdown
from autobatch.report.charts.frame import save, style
from autobatch.report.charts.memory import draw_memory, memory_chart
from autobatch.report.charts.timeline import draw_timeline, timeline_chart

__all__ = ["write_charts"]


def write_charts(plan: PlanRecord, folder: Path) -> dict[str, str]:
    """Draw every chart as NAME.png and NAME.svg, and return each SVG for inlining.

    Raises:
        FileError: a file cannot be written.
    """
    with style():
        figures = {
            "memory": draw_memory(memory_chart(plan)),
            "breakdown": draw_breakdown(breakdown_chart(plan)),
            "timeline": draw_timeline(timeline_chart(plan)),
        }
        return {name: save(figure, folder, name) for name, figure in figures.items()}
