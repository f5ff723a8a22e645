"""Charts of a plan; the only user of matplotlib.

Invariant: each chart is first a record of numbers in bytes, then a `Figure` that pyplot never sees.
Labels that could meet stand outside the axes, on opposite sides of their lines.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from autobatch.errors import FileError
from autobatch.records.footprint import Evidence, Footprint
from autobatch.records.plan_record import PlanRecord
from autobatch.support.files import write_text
from autobatch.support.units import GIB, MIB, format_bytes

__all__ = [
    "BreakdownBar",
    "BreakdownChart",
    "CurvePoint",
    "MemoryChart",
    "Span",
    "TimelineChart",
    "breakdown_chart",
    "draw_breakdown",
    "draw_memory",
    "draw_timeline",
    "memory_chart",
    "timeline_chart",
    "write_charts",
]

# Paul Tol's "muted" scheme: distinguishable with any common colour blindness.
COLOURS = {
    "other processes": "#000000",
    "context": "#555555",
    "parameters": "#332288",
    "buffers": "#88CCEE",
    "gradients": "#CC6677",
    "optimizer state": "#DDCC77",
    "activations": "#44AA99",
    "temporaries": "#AA4499",
    "inputs": "#117733",
    "workspace": "#999933",
    "other": "#882255",
    "rounding": "#BBBBBB",
    "cached": "#E4E4E4",
}
PHASES = {
    "setup": "#D9D9D9",
    "inputs": "#A6A6A6",
    "forward": "#9DC3E6",
    "backward": "#F4B183",
    "step": "#7A6FAC",
    "evaluate": "#C5E0B4",
}
INK, FAINT, BUDGET = "#1D2430", "#5B6678", "#B22222"
MARKERS: dict[Evidence, str] = {"measured": "o", "simulated": "D", "predicted": "."}
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "text.usetex": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": "#E7EAEF",
    "legend.frameon": False,
    "svg.fonttype": "path",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Peak bytes at one micro-batch, and how they are known."""

    micro_batch: int
    allocated_bytes: int
    reserved_bytes: int
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChart:
    """Memory against micro-batch, smallest first; `ceiling` is the largest known to fit."""

    points: tuple[CurvePoint, ...]
    budget_bytes: int
    chosen: CurvePoint
    ceiling: int
    ceiling_is_exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakdownBar:
    """One stacked bar: parts by category, other processes and context first, cached last."""

    label: str
    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakdownChart:
    """Bars against the device; the budget ends at `limit_bytes`, with what comes before it."""

    bars: tuple[BreakdownBar, ...]
    limit_bytes: int
    capacity_bytes: int


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


def memory_chart(plan: PlanRecord) -> MemoryChart:
    """Collect the curve, with what really ran in place of what was predicted."""
    footprint = plan.footprint
    chosen = CurvePoint(
        micro_batch=footprint.micro_batch,
        allocated_bytes=footprint.peak_allocated_bytes,
        reserved_bytes=footprint.peak_reserved_bytes,
        evidence=footprint.evidence,
    )
    points = {chosen.micro_batch: chosen}
    for point in plan.curve:
        points[point.micro_batch] = CurvePoint(
            micro_batch=point.micro_batch,
            allocated_bytes=point.peak_allocated_bytes,
            reserved_bytes=point.peak_reserved_bytes,
            evidence=point.evidence,
        )
    return MemoryChart(
        points=tuple(points[size] for size in sorted(points)),
        budget_bytes=plan.budget_bytes,
        chosen=chosen,
        ceiling=plan.ceiling_at_least,
        ceiling_is_exact=plan.ceiling is not None,
    )


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


def timeline_chart(plan: PlanRecord) -> TimelineChart:
    """Collect the traced windows; what the categories leave of the allocated bytes is rounding."""
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


def draw_memory(chart: MemoryChart) -> Figure:
    """Draw memory against micro-batch with the budget, the ceiling and the chosen size."""
    figure, axes = _figure(8.6, 4.9, "Memory against micro-batch", bottom=0.22)
    sizes = [point.micro_batch for point in chart.points]
    top = max(chart.budget_bytes, *(point.reserved_bytes for point in chart.points)) * 1.06
    unit, scale = _unit(top)
    axes.plot(sizes, [p.allocated_bytes / scale for p in chart.points], color=FAINT, ls=":", lw=1.4)
    axes.plot(sizes, [p.reserved_bytes / scale for p in chart.points], color="#44AA99", lw=1.8)
    for evidence, marker in MARKERS.items():
        known = [point for point in chart.points if point.evidence == evidence]
        axes.plot(
            [point.micro_batch for point in known],
            [point.reserved_bytes / scale for point in known],
            marker,
            color="#117733" if evidence != "predicted" else "#44AA99",
            ms=6,
            zorder=3,
        )
    budget = chart.budget_bytes / scale
    axes.axhspan(budget, top / scale, color=BUDGET, alpha=0.06, lw=0)
    axes.axhline(budget, color=BUDGET, lw=1.3)
    chosen = chart.chosen
    axes.plot(
        [chosen.micro_batch],
        [chosen.reserved_bytes / scale],
        "o",
        ms=13,
        mfc="none",
        mec="#332288",
        mew=2,
        zorder=4,
    )
    ceiling = "ceiling" if chart.ceiling_is_exact else "at least"
    if chart.ceiling == chosen.micro_batch:
        _top_labels(axes, [(chart.ceiling, f"plan = {ceiling} {chart.ceiling:,}", "#332288")])
    else:
        _top_labels(
            axes,
            [
                (chosen.micro_batch, f"plan {chosen.micro_batch:,}", "#332288"),
                (chart.ceiling, f"{ceiling} {chart.ceiling:,}", INK),
            ],
        )
    axes.set(
        xlabel="micro-batch (samples in one forward/backward)",
        ylabel=f"peak memory ({unit})",
        xlim=(0, max(*sizes, chart.ceiling) * 1.18),
        ylim=(0, top / scale),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    used = {point.evidence for point in chart.points}
    _legend(
        figure,
        [
            Line2D([], [], color="#44AA99", lw=1.8, label="reserved"),
            Line2D([], [], color=FAINT, ls=":", lw=1.4, label="allocated"),
            Line2D(
                [], [], color=BUDGET, lw=1.3, label=f"budget {format_bytes(chart.budget_bytes)}"
            ),
            *(
                Line2D(
                    [],
                    [],
                    color="#44AA99" if evidence == "predicted" else "#117733",
                    marker=MARKERS[evidence],
                    ls="",
                    label=evidence,
                )
                for evidence in MARKERS
                if evidence in used
            ),
            Line2D(
                [],
                [],
                marker="o",
                ls="",
                ms=9,
                mfc="none",
                mec="#332288",
                mew=2,
                label=f"plan, {format_bytes(chosen.reserved_bytes)} reserved",
            ),
        ],
        columns=4,
    )
    return figure


def draw_breakdown(chart: BreakdownChart) -> Figure:
    """Draw the stacked bytes of each bar against the budget and the capacity."""
    height = 2.2 + 0.75 * len(chart.bars)
    figure, axes = _figure(8.6, height, "Memory at the peak", bottom=1.05 / height, left=0.15)
    widest = max(chart.capacity_bytes, *(sum(size for _, size in b.parts) for b in chart.bars))
    unit, scale = _unit(widest)
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
                    color=_ink_on(COLOURS[name]),
                )
            left += size
    limit, capacity = chart.limit_bytes, chart.capacity_bytes
    axes.axvspan(limit / scale, capacity / scale, color=BUDGET, alpha=0.06, lw=0)
    _top_labels(
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
    _legend(figure, [Patch(color=COLOURS[n], label=n) for n in COLOURS if n in used], columns=6)
    return figure


def draw_timeline(chart: TimelineChart) -> Figure:
    """Draw live bytes stacked by category, reserved above, phases in a ribbon, the peak marked."""
    figure, axes = _figure(8.6, 5.4, "Memory over the training windows", bottom=0.245, top=0.82)
    top = max((*chart.reserved_bytes, chart.peak_bytes, 1)) * 1.12
    unit, scale = _unit(top)
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
    _legend(
        figure,
        [
            Line2D([], [], color=BUDGET, lw=1.4, ls="--", label="reserved"),
            Line2D([], [], color=INK, lw=0.7, label="allocated"),
            *(Patch(color=COLOURS[name], label=name) for name, _ in chart.series),
            *(
                Patch(color=colour, label=f"phase: {name}")
                for name, colour in PHASES.items()
                if name in used
            ),
        ],
        columns=6,
    )
    return figure


def write_charts(plan: PlanRecord, folder: Path) -> dict[str, str]:
    """Draw every chart as NAME.png and NAME.svg, and return each SVG for inlining.

    Raises:
        FileError: a file cannot be written.
    """
    drawings = {}
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        figures = {
            "memory": draw_memory(memory_chart(plan)),
            "breakdown": draw_breakdown(breakdown_chart(plan)),
            "timeline": draw_timeline(timeline_chart(plan)),
        }
        for name, figure in figures.items():
            try:
                FigureCanvasAgg(figure)
                figure.savefig(folder / f"{name}.png", format="png", dpi=160)
            except OSError as error:
                raise FileError(
                    f"cannot write {name}.png into {str(folder)!r}: {error.strerror}; "
                    "name another folder"
                ) from error
            svg = _svg(figure, name)
            write_text(folder / f"{name}.svg", svg)
            drawings[name] = svg[svg.index("<svg") :]
    return drawings


def _svg(figure: Figure, name: str) -> str:
    """Render as SVG, the same bytes every time, with ids that are unique on one page."""
    mpl.rcParams["svg.hashsalt"] = name
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", buffer.getvalue())


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


def _figure(
    width: float,
    height: float,
    title: str,
    *,
    bottom: float,
    top: float | None = None,
    left: float = 0.11,
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), facecolor="white")
    top = 1 - 0.72 / height if top is None else top
    axes = figure.add_axes((left, bottom, 0.97 - left, top - bottom))
    figure.text(0.02, 1 - 0.12 / height, title, va="top", fontsize=12, fontweight="bold")
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    return figure, axes


def _top_labels(axes: Axes, lines: Sequence[tuple[float, str, str]]) -> None:
    """Draw vertical lines named above the axes; of two, the left one's name extends to the left."""
    ordered = sorted(lines)
    for index, (x, text, colour) in enumerate(ordered):
        axes.axvline(x, color=colour, lw=1.1, ls=(0, (4, 3)))
        axes.annotate(
            text,
            (x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right" if index == 0 else "left",
            color=colour,
            fontsize=9,
            annotation_clip=False,
        )


def _mark_peak(axes: Axes, chart: TimelineChart, scale: int, first: int, last: int) -> None:
    """Mark the peak and name it in the band above the reserved line, which nothing else uses."""
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
    """Draw phases as coloured blocks above the axes, and the window's number above them."""
    box = axes.get_position()
    ribbon = figure.add_axes((box.x0, box.y1 + 0.012, box.width, 0.045), sharex=axes)
    ribbon.set_axis_off()
    ribbon.set_ylim(0, 1)
    low, high = axes.get_xlim()
    for span in spans:
        share = (span.end - span.start) / (high - low)
        colour = PHASES.get(span.phase, "#EEEEEE")
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
                color=_ink_on(colour),
            )
    for window in sorted({span.window for span in spans}):
        inside = [span for span in spans if span.window == window and span.phase != "setup"]
        if inside:
            start, end = inside[0].start, inside[-1].end
            ribbon.text((start + end) / 2, 1.15, f"window {window + 1}", ha="center", fontsize=8.5)
    for before, after in pairwise(spans):
        if before.window != after.window:
            axes.axvline(after.start, color=INK, lw=0.8, ls=":")


def _legend(figure: Figure, handles: Sequence[Line2D | Patch], columns: int) -> None:
    figure.legend(
        handles=list(handles),
        loc="lower left",
        bbox_to_anchor=(0.09, 0.005),
        ncols=columns,
        fontsize=8.5,
        columnspacing=1.3,
        handlelength=1.6,
    )


def _unit(top_bytes: float) -> tuple[str, int]:
    return ("GiB", GIB) if top_bytes >= GIB else ("MiB", MIB)


def _ink_on(colour: str) -> str:
    red, green, blue = to_rgb(colour)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else INK
