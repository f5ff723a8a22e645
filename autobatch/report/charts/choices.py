"""Charts of choices: cards side by side, and micro-batch and throughput along a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, StrMethodFormatter

from autobatch.records.comparison import ComparisonRecord, FrontierRecord
from autobatch.report.charts.frame import add_legend, new_figure
from autobatch.report.colours import FAINT, INDIGO, INK, ROSE, TEAL
from autobatch.report.comparison import money_text, sizes_text

__all__ = [
    "ComparisonChart",
    "FrontierChart",
    "comparison_chart",
    "draw_comparison",
    "draw_frontier",
    "frontier_chart",
]

_BAR, _SIZE, _PACE = TEAL, INDIGO, ROSE

_DECADE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonChart:
    """Estimated samples a second by card, the fastest first, as (name, likely, low, high, note)."""

    bars: tuple[tuple[str, float, float, float, str], ...]


def comparison_chart(compared: ComparisonRecord) -> ComparisonChart:
    """Collect the cards whose time is estimated."""
    bars: list[tuple[str, float, float, float, str]] = []
    for card in compared.fitting:
        window = card.outcome.window
        if window is None or window.low is None or window.high is None:
            continue
        sizes = sizes_text(card.outcome, compared.target, compared.world_size)
        note = f"{sizes} × {card.outcome.accumulation_steps:,}"
        if card.cost_per_million is not None:
            note += f", {money_text(card.cost_per_million)} a million samples"
        likely, low, high = (
            compared.target / seconds for seconds in (window.seconds, window.high, window.low)
        )
        bars.append((card.gpu.name, likely, low, high, note))
    return ComparisonChart(bars=tuple(sorted(bars, key=lambda bar: -bar[1])))


def draw_comparison(chart: ComparisonChart) -> Figure:
    """Draw a bar for each card with its estimate's range; beside it, micro-batch × steps."""
    height = 1.5 + 0.42 * len(chart.bars)
    figure, axes = new_figure("Estimated samples a second", height, bottom=0.62 / height, left=0.17)
    places = range(len(chart.bars))
    likely = [bar[1] for bar in chart.bars]
    axes.barh(places, likely, color=_BAR, height=0.6)
    for place, (_, rate, low, high, note) in enumerate(chart.bars):
        axes.plot([low, high], [place, place], color=INK, lw=1.2, marker="|", ms=7)
        axes.annotate(
            note,
            (max(high, rate), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=FAINT,
        )
    axes.set_yticks(places, [bar[0] for bar in chart.bars])
    axes.invert_yaxis()
    axes.set(
        xlabel="samples/s (estimate; lines: four of five windows), and micro-batch × steps",
        xlim=(0, 1.45 * max((bar[3] for bar in chart.bars), default=1.0)),
    )
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierChart:
    """Points of a frontier, by value.

    Attributes:
        parameter: on the horizontal axis.
        ceilings: largest micro-batch by value.
        unbounded: values at which the search stopped at its limit: more may fit than the ceiling.
        planned: micro-batch of the plan by value.
        paces: tokens or samples a second by value, where known.
        unit: of the paces, "tokens" or "samples".
        evidence: how the paces are known.
    """

    parameter: str
    ceilings: tuple[tuple[int, int], ...]
    unbounded: frozenset[int]
    planned: tuple[tuple[int, int], ...]
    paces: tuple[tuple[int, float], ...]
    unit: str
    evidence: str


def frontier_chart(found: FrontierRecord) -> FrontierChart:
    """Collect the values that fit."""
    fitting = [point for point in found.points if point.outcome.fits]
    paces = [(point.value, found.throughput(point)) for point in fitting]
    windows = [point.outcome.window for point in fitting]
    return FrontierChart(
        parameter=found.parameter,
        ceilings=tuple((point.value, point.outcome.ceiling_at_least) for point in fitting),
        unbounded=frozenset(p.value for p in fitting if p.outcome.ceiling is None),
        planned=tuple((point.value, point.outcome.micro_batch or 0) for point in fitting),
        paces=tuple((value, pace) for value, pace in paces if pace is not None),
        unit=found.unit,
        evidence=next((window.evidence for window in windows if window is not None), "estimate"),
    )


def draw_frontier(chart: FrontierChart) -> Figure:
    """Draw micro-batches against the parameter, and throughput on an axis of its own."""
    figure, axes = new_figure(
        f"Micro-batch and throughput along {chart.parameter}", 4.9, bottom=0.23
    )
    right = 0.09 if chart.paces else 0.0
    box = axes.get_position()
    axes.set_position((box.x0, box.y0, box.width - right, box.height))
    ceiling: dict[str, Any] = {"color": _SIZE, "lw": 1.8, "marker": "o", "ms": 6}
    planned: dict[str, Any] = {
        "color": _SIZE,
        "lw": 1.2,
        "ls": ":",
        "marker": "D",
        "ms": 5,
        "mfc": "white",
    }
    pace: dict[str, Any] = {"color": _PACE, "lw": 1.6, "ls": "--", "marker": "s", "ms": 5}
    axes.plot(*_columns(chart.ceilings), **ceiling)
    for point in chart.ceilings:
        if point[0] in chart.unbounded:
            _point_upwards(axes, point)
    axes.plot(*_columns(chart.planned), **planned)
    values = [value for value, _ in chart.ceilings]
    if min(values, default=1) * 4 <= max(values, default=1):
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel=chart.parameter, ylabel="micro-batch (samples)")
    _scale_sizes(axes, [size for _, size in (*chart.ceilings, *chart.planned)])
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    handles = [
        Line2D([], [], label="ceiling: the largest that fits", **ceiling),
        Line2D([], [], label="plan", **planned),
    ]
    if chart.unbounded:
        arrow: dict[str, Any] = {"color": _SIZE, "ls": "none", "marker": r"$\uparrow$", "ms": 9}
        handles.insert(1, Line2D([], [], label="at least: the search went no further", **arrow))
    if chart.paces:
        other = axes.twinx()
        axes.set_zorder(other.get_zorder() + 1)  # a plan and its ceiling are what the chart is of
        axes.patch.set_visible(False)
        other.plot(*_columns(chart.paces), **pace)
        top = 1.12 * max(rate for _, rate in chart.paces)
        other.set(ylabel=f"{chart.unit}/s ({chart.evidence})", ylim=(0, top))
        other.spines["right"].set_visible(True)
        other.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        handles.append(Line2D([], [], label=f"{chart.unit}/s ({chart.evidence})", **pace))
    add_legend(figure, handles)
    return figure


def _point_upwards(axes: Axes, point: tuple[int, int]) -> None:
    """Let a short arrow rise from a point, above which the search did not look."""
    axes.annotate(
        "",
        point,
        xytext=(0, 20),
        textcoords="offset points",
        arrowprops={"arrowstyle": "<-", "color": _SIZE, "lw": 1.8, "shrinkA": 0, "shrinkB": 0},
    )


def _scale_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """Let a plan be told from zero where it is a small part of the ceiling."""
    if min(sizes) * _DECADE <= max(sizes):
        axes.set_yscale("log")
        axes.set_ylim(min(sizes) / 2, 3 * max(sizes))  # room for the arrows
    else:
        axes.set_ylim(0, 1.12 * max(sizes))


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
