"""Memory over the training windows: live bytes by category, event by event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import StrMethodFormatter

from autobatch.records.plan_record import PlanRecord
from autobatch.report.charts.frame import (
    BUDGET,
    COLOURS,
    INK,
    add_legend,
    byte_unit,
    ink_on,
    new_figure,
)
from autobatch.support.units import format_bytes

__all__ = ["Span", "TimelineChart", "draw_timeline", "timeline_chart"]

_PHASES = {
    "setup": "#D9D9D9",
    "inputs": "#A6A6A6",
    "forward": "#9DC3E6",
    "backward": "#F4B183",
    "step": "#7A6FAC",
    "evaluate": "#C5E0B4",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A phase of a training window, from one event to another."""

    start: int
    end: int
    phase: str
    window: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineChart:
    """Live bytes by category at each event; every series is as long as `events`."""

    events: tuple[int, ...]
    series: tuple[tuple[str, tuple[int, ...]], ...]
    allocated_bytes: tuple[int, ...]
    reserved_bytes: tuple[int, ...]
    spans: tuple[Span, ...]
    peak_event: int
    peak_bytes: int


def timeline_chart(plan: PlanRecord) -> TimelineChart:
    """Collect the traced windows; allocated bytes that no category has are rounding."""
    samples = plan.timeline.samples
    names = [name for name in COLOURS if any(sample.categories.get(name) for sample in samples)]
    series = [(name, tuple(s.categories.get(name, 0) for s in samples)) for name in names]
    allocated = tuple(sample.allocated_bytes for sample in samples)
    rounding = tuple(
        max(0, total - sum(sample.categories.values()))
        for total, sample in zip(allocated, samples, strict=True)
    )
    if any(rounding) and "rounding" not in names:
        series.append(("rounding", rounding))
    events = tuple(sample.event for sample in samples)
    ends = [*(mark[0] for mark in plan.timeline.marks[1:]), events[-1] if events else 0]
    return TimelineChart(
        events=events,
        series=tuple(series),
        allocated_bytes=allocated,
        reserved_bytes=tuple(sample.reserved_bytes for sample in samples),
        spans=tuple(
            Span(start=event, end=end, phase=phase, window=window)
            for (event, phase, window, _), end in zip(plan.timeline.marks, ends, strict=False)
            if end > event
        ),
        peak_event=plan.timeline.peak_event,
        peak_bytes=max(allocated, default=0),
    )


def draw_timeline(chart: TimelineChart) -> Figure:
    """Draw live bytes stacked by category, reserved above, phases in a ribbon, the peak marked."""
    figure, axes = new_figure(8.6, 5.4, "Memory over the training windows", bottom=0.245, top=0.82)
    top = max((*chart.reserved_bytes, chart.peak_bytes, 1)) * 1.12
    unit, scale = byte_unit(top)
    if chart.series:
        axes.stackplot(
            chart.events,
            *([size / scale for size in sizes] for _, sizes in chart.series),
            colors=[COLOURS[name] for name, _ in chart.series],
            step="post",
            linewidth=0,
        )
    axes.step(
        chart.events, [s / scale for s in chart.allocated_bytes], where="post", color=INK, lw=0.7
    )
    axes.step(
        chart.events,
        [s / scale for s in chart.reserved_bytes],
        where="post",
        color=BUDGET,
        lw=1.4,
        ls="--",
    )
    first, last = (chart.events[0], chart.events[-1]) if chart.events else (0, 1)
    _mark_peak(axes, chart, scale, first, last)
    axes.set(
        xlabel="allocations and frees, in order",
        ylabel=f"memory ({unit})",
        xlim=(first, max(last, first + 1)),
        ylim=(0, top / scale),
    )
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _ribbon(figure, axes, chart.spans)
    used = {span.phase for span in chart.spans}
    add_legend(
        figure,
        [
            Line2D([], [], color=BUDGET, lw=1.4, ls="--", label="reserved"),
            Line2D([], [], color=INK, lw=0.7, label="allocated"),
            *(Patch(color=COLOURS[name], label=name) for name, _ in chart.series),
            *(
                Patch(color=colour, label=f"phase: {name}")
                for name, colour in _PHASES.items()
                if name in used
            ),
        ],
        columns=6,
    )
    return figure


def _mark_peak(axes: Axes, chart: TimelineChart, scale: int, first: int, last: int) -> None:
    """Mark the peak; its label stands in the empty band above the reserved line."""
    peak = chart.peak_bytes / scale
    axes.plot([chart.peak_event], [peak], "v", color=INK, ms=7, clip_on=False, zorder=5)
    left = chart.peak_event > (first + last) / 2
    shift = (last - first) * (-0.02 if left else 0.02)
    axes.annotate(
        f"peak {format_bytes(chart.peak_bytes)} allocated",
        (chart.peak_event, peak),
        xytext=(chart.peak_event + shift, 0.955),
        textcoords=axes.get_xaxis_transform(),
        ha="right" if left else "left",
        va="center",
        fontsize=9,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.8},
    )


def _ribbon(figure: Figure, axes: Axes, spans: Sequence[Span]) -> None:
    """Draw each phase as a coloured block above the axes, and the windows' numbers above these."""
    box = axes.get_position()
    ribbon = figure.add_axes((box.x0, box.y1 + 0.012, box.width, 0.045), sharex=axes)
    ribbon.set_axis_off()
    ribbon.set_ylim(0, 1)
    low, high = axes.get_xlim()
    for span in spans:
        share = (span.end - span.start) / (high - low)
        colour = _PHASES.get(span.phase, "#EEEEEE")
        ribbon.axvspan(span.start, span.end, color=colour, lw=0)
        if share > 0.014 * len(span.phase):
            middle = (span.start + span.end) / 2
            ribbon.text(
                middle,
                0.45,
                span.phase,
                ha="center",
                va="center",
                fontsize=8,
                color=ink_on(colour),
            )
    for window in sorted({span.window for span in spans}):
        inside = [span for span in spans if span.window == window and span.phase != "setup"]
        if inside:
            start, end = inside[0].start, inside[-1].end
            ribbon.text((start + end) / 2, 1.15, f"window {window + 1}", ha="center", fontsize=8.5)
    for before, after in pairwise(spans):
        if before.window != after.window:
            axes.axvline(after.start, color=INK, lw=0.8, ls=":")
