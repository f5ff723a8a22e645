"""Seconds of a window against bytes reserved: every configuration of a sweep, and the front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from autobatch.records.sweep import SweepRecord
from autobatch.report.charts.frame import add_legend, byte_unit, name_lines, new_figure
from autobatch.report.colours import BUDGET, FAINT, INDIGO, INK, ROSE
from autobatch.support.units import format_bytes, format_seconds

__all__ = ["ParetoChart", "ParetoPoint", "draw_pareto", "pareto_chart"]

_FRONT, _UNCHANGED = INDIGO, ROSE


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """A configuration that finished."""

    seconds: float
    reserved_bytes: int
    is_as_it_is: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoChart:
    """All points, and those of the front, the fastest first."""

    points: tuple[ParetoPoint, ...]
    front: tuple[ParetoPoint, ...]
    budget_bytes: int
    time: str
    memory: str


def pareto_chart(record: SweepRecord) -> ParetoChart:
    """Collect the finished trials of a sweep."""

    def points(trials: object) -> tuple[ParetoPoint, ...]:
        return tuple(
            ParetoPoint(
                seconds=trial.seconds,
                reserved_bytes=trial.reserved_bytes,
                is_as_it_is=trial.is_as_it_is,
            )
            for trial in trials  # type: ignore[attr-defined]
            if trial.seconds is not None
        )

    return ParetoChart(
        points=points(record.trials),
        front=points(record.front),
        budget_bytes=record.budget_bytes,
        time=record.time,
        memory=record.memory,
    )


def draw_pareto(chart: ParetoChart) -> Figure:
    """Draw memory to the right and time upwards, both as ratios: lower left is better."""
    figure, axes = new_figure("Speed against memory", 4.9, bottom=0.22)
    least, most = _span([point.reserved_bytes for point in chart.points])
    unit, scale = byte_unit(most)
    groups = ((False, FAINT, "o", "with levers"), (True, _UNCHANGED, "s", "as it is"))
    handles = []
    for unchanged, colour, marker, name in groups:
        chosen = [point for point in chart.points if point.is_as_it_is == unchanged]
        if chosen:
            sizes = [point.reserved_bytes / scale for point in chosen]
            times = [point.seconds for point in chosen]
            axes.plot(sizes, times, marker, color=colour, ms=5, alpha=0.75, mec="none")
            handles.append(Line2D([], [], marker=marker, ls="", color=colour, label=name))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"reserved ({unit}, {chart.memory})",
        ylabel=f"seconds of a training window ({chart.time})",
        xlim=(least / scale, max(most, 1.1 * chart.budget_bytes) / scale),
        ylim=_span([point.seconds for point in chart.points]),
    )
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        marks = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)
        axis.set_major_locator(LogLocator(subs=marks))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    front = [(point.reserved_bytes / scale, point.seconds) for point in reversed(chart.front)]
    axes.step(*zip(*front, strict=True), where="post", color=_FRONT, lw=1.6, zorder=3)
    axes.plot(*zip(*front, strict=True), "o", mfc="none", mec=_FRONT, mew=1.6, ms=9, zorder=4)
    handles.append(Line2D([], [], marker="o", mfc="none", mec=_FRONT, color=_FRONT, label="front"))
    budget = chart.budget_bytes / scale
    name_lines(axes, [(budget, f"budget {format_bytes(chart.budget_bytes)}", BUDGET)])
    best = chart.front[0]
    at = best.reserved_bytes / scale, best.seconds
    is_right = axes.transAxes.inverted().transform(axes.transData.transform(at))[0] > 0.4
    axes.annotate(
        f"fastest: {format_seconds(best.seconds)}, {format_bytes(best.reserved_bytes)}",
        at,
        xytext=(-12 if is_right else 12, -4),
        textcoords="offset points",
        ha="right" if is_right else "left",
        va="top",
        fontsize=9,
        color=INK,
        fontweight="bold",
    )
    add_legend(figure, handles)
    return figure


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis of ratios, with room for what is written below the lowest."""
    low, high = min(values), max(values)
    room = max(high / low, 1.5) ** 0.14
    return low / room, high * room
