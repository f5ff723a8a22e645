"""Memory against micro-batch, with the budget, the plan and the ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from autobatch.records.evidence import MemoryPoint
from autobatch.records.footprint import Evidence
from autobatch.records.plan_record import PlanRecord
from autobatch.report.charts.frame import (
    BUDGET,
    FAINT,
    INK,
    add_legend,
    byte_unit,
    name_lines,
    new_figure,
)
from autobatch.support.units import format_bytes

__all__ = ["MemoryChart", "draw_memory", "memory_chart"]

_MARKERS: dict[Evidence, str] = {"measured": "o", "simulated": "D", "predicted": "."}
_RESERVED, _RAN, _PLAN = "#44AA99", "#117733", "#332288"
_RESERVED_LINE: dict[str, Any] = {"color": _RESERVED, "lw": 1.8}
_ALLOCATED_LINE: dict[str, Any] = {"color": FAINT, "ls": ":", "lw": 1.4}
_RING: dict[str, Any] = {"marker": "o", "ls": "", "mfc": "none", "mec": _PLAN, "mew": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChart:
    """Memory against micro-batch, smallest first; `ceiling` is the largest known to fit."""

    points: tuple[MemoryPoint, ...]
    budget_bytes: int
    chosen: MemoryPoint
    ceiling: int
    ceiling_is_exact: bool


def memory_chart(plan: PlanRecord) -> MemoryChart:
    """Collect the curve, with what really ran in place of what was predicted."""
    footprint = plan.footprint
    chosen = MemoryPoint(
        micro_batch=footprint.micro_batch,
        peak_allocated_bytes=footprint.peak_allocated_bytes,
        peak_reserved_bytes=footprint.peak_reserved_bytes,
        evidence=footprint.evidence,
    )
    points = {point.micro_batch: point for point in (chosen, *plan.curve)}
    return MemoryChart(
        points=tuple(points[size] for size in sorted(points)),
        budget_bytes=plan.budget_bytes,
        chosen=chosen,
        ceiling=plan.ceiling_at_least,
        ceiling_is_exact=plan.ceiling is not None,
    )


def draw_memory(chart: MemoryChart) -> Figure:
    """Draw memory against micro-batch with the budget, the ceiling and the chosen size."""
    figure, axes = new_figure(8.6, 4.9, "Memory against micro-batch", bottom=0.22)
    top = max(chart.budget_bytes, *(point.peak_reserved_bytes for point in chart.points)) * 1.06
    unit, scale = byte_unit(top)
    _draw_curve(axes, chart.points, scale)
    budget = chart.budget_bytes / scale
    axes.axhspan(budget, top / scale, color=BUDGET, alpha=0.06, lw=0)
    axes.axhline(budget, color=BUDGET, lw=1.3)
    chosen = chart.chosen
    axes.plot([chosen.micro_batch], [chosen.peak_reserved_bytes / scale], ms=13, zorder=4, **_RING)
    ceiling = "ceiling" if chart.ceiling_is_exact else "at least"
    if chart.ceiling == chosen.micro_batch:
        names = [(chart.ceiling, f"plan = {ceiling} {chart.ceiling:,}", _PLAN)]
    else:
        names = [
            (chosen.micro_batch, f"plan {chosen.micro_batch:,}", _PLAN),
            (chart.ceiling, f"{ceiling} {chart.ceiling:,}", INK),
        ]
    name_lines(axes, names)
    axes.set(
        xlabel="micro-batch (samples in one forward/backward)",
        ylabel=f"peak memory ({unit})",
        xlim=(0, max(*(point.micro_batch for point in chart.points), chart.ceiling) * 1.18),
        ylim=(0, top / scale),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    add_legend(figure, _legend_handles(chart), columns=4)
    return figure


def _draw_curve(axes: Axes, points: Sequence[MemoryPoint], scale: int) -> None:
    """Draw allocated and reserved bytes, and a marker at each size that says how it is known."""
    sizes = [point.micro_batch for point in points]
    axes.plot(sizes, [p.peak_allocated_bytes / scale for p in points], **_ALLOCATED_LINE)
    axes.plot(sizes, [p.peak_reserved_bytes / scale for p in points], **_RESERVED_LINE)
    for evidence, marker in _MARKERS.items():
        known = [point for point in points if point.evidence == evidence]
        axes.plot(
            [point.micro_batch for point in known],
            [point.peak_reserved_bytes / scale for point in known],
            marker,
            color=_marker_colour(evidence),
            ms=6,
            zorder=3,
        )


def _legend_handles(chart: MemoryChart) -> list[Line2D]:
    used = {point.evidence for point in chart.points}
    budget = f"budget {format_bytes(chart.budget_bytes)}"
    plan = f"plan, {format_bytes(chart.chosen.peak_reserved_bytes)} reserved"
    return [
        Line2D([], [], label="reserved", **_RESERVED_LINE),
        Line2D([], [], label="allocated", **_ALLOCATED_LINE),
        Line2D([], [], label=budget, color=BUDGET, lw=1.3),
        *(
            Line2D([], [], label=evidence, color=_marker_colour(evidence), marker=marker, ls="")
            for evidence, marker in _MARKERS.items()
            if evidence in used
        ),
        Line2D([], [], label=plan, ms=9, **_RING),
    ]


def _marker_colour(evidence: Evidence) -> str:
    return _RESERVED if evidence == "predicted" else _RAN
