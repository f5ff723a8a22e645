"""Memory at the peak: bytes by category, stacked, against the budget and the capacity."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from autobatch.records.footprint import Footprint
from autobatch.records.plan_record import PlanRecord
from autobatch.report.charts.frame import (
    BUDGET,
    COLOURS,
    INK,
    add_legend,
    byte_unit,
    ink_on,
    name_lines,
    new_figure,
)
from autobatch.support.units import format_bytes

__all__ = ["BreakdownBar", "BreakdownChart", "breakdown_chart", "draw_breakdown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakdownBar:
    """One stacked bar of (category, bytes): other processes and context first, cached last."""

    label: str
    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakdownChart:
    """Bars on an axis of device memory; `limit_bytes` is the point on it where the budget ends."""

    bars: tuple[BreakdownBar, ...]
    limit_bytes: int
    capacity_bytes: int


def breakdown_chart(plan: PlanRecord) -> BreakdownChart:
    """Collect the footprints at the planned micro-batch and, where it differs, at the ceiling."""
    chosen, ceiling = plan.footprint, plan.ceiling_footprint
    bars = [_bar("plan", chosen, plan.others_bytes)]
    if ceiling.micro_batch != chosen.micro_batch:
        label = "ceiling" if plan.ceiling is not None else "at least"
        bars.append(_bar(label, ceiling, plan.others_bytes))
    return BreakdownChart(
        bars=tuple(bars),
        limit_bytes=plan.gpu.context_bytes + plan.others_bytes + plan.budget_bytes,
        capacity_bytes=plan.gpu.capacity_bytes,
    )


def draw_breakdown(chart: BreakdownChart) -> Figure:
    """Draw the stacked bytes of each bar against the budget and the capacity."""
    height = 2.2 + 0.75 * len(chart.bars)
    figure, axes = new_figure(8.6, height, "Memory at the peak", bottom=1.05 / height, left=0.15)
    widest = max(chart.capacity_bytes, *(sum(size for _, size in b.parts) for b in chart.bars))
    unit, scale = byte_unit(widest)
    axes.grid(axis="y", visible=False)
    for row, bar in enumerate(chart.bars):
        left = 0
        for name, size in bar.parts:
            axes.barh(
                row,
                size / scale,
                left=left / scale,
                height=0.62,
                color=COLOURS[name],
                edgecolor="white",
                linewidth=0.6,
            )
            if size > 0.1 * widest:
                axes.text(
                    (left + size / 2) / scale,
                    row,
                    f"{name}\n{format_bytes(size)}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color=ink_on(COLOURS[name]),
                )
            left += size
    limit, capacity = chart.limit_bytes, chart.capacity_bytes
    axes.axvspan(limit / scale, capacity / scale, color=BUDGET, alpha=0.06, lw=0)
    name_lines(
        axes,
        [
            (limit / scale, f"budget ends {format_bytes(limit)}", BUDGET),
            (capacity / scale, f"capacity {format_bytes(capacity)}", INK),
        ],
    )
    axes.set(
        xlabel=f"on the device ({unit}), CUDA context included",
        xlim=(0, widest / scale * 1.16),
        ylim=(len(chart.bars) - 0.45, -0.55),
    )
    axes.set_yticks(
        range(len(chart.bars)),
        [f"{b.label}\n{format_bytes(sum(size for _, size in b.parts))}" for b in chart.bars],
    )
    axes.tick_params(axis="y", length=0)
    used = {name for bar in chart.bars for name, size in bar.parts if size}
    add_legend(figure, [Patch(color=COLOURS[n], label=n) for n in COLOURS if n in used], columns=6)
    return figure


def _bar(label: str, footprint: Footprint, others_bytes: int) -> BreakdownBar:
    parts = {
        "other processes": others_bytes,
        "context": footprint.context_bytes,
        **footprint.categories,
        "cached": footprint.cached_bytes,
    }
    return BreakdownBar(
        label=f"{label} {footprint.micro_batch:,}",
        parts=tuple((name, max(0, size)) for name, size in parts.items()),
    )
