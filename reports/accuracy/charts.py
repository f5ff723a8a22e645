"""Charts of a run: each is a figure of matplotlib, saved as PNG and SVG."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import log
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from autobatch.report.charts.frame import FAINT, INK
from autobatch.support.units import GIB
from reports.accuracy.predict import LARGEST
from reports.accuracy.score import CLOSE, Bracket, Peak, Verdict
from reports.common.charts import CYAN, INDIGO, ROSE, SAND, STYLE, TEAL

OVER, UNDER, FINE = ROSE, INDIGO, TEAL
_SETS = (INDIGO, TEAL, ROSE, CYAN, SAND, "#117733", "#882255", "#999933")
_COLOURS: Mapping[Verdict, str] = {"inside": FINE, "below": UNDER, "above": OVER}
_STYLE = {
    **STYLE,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
}
_LABELLED = 8
_ROOM = 0.1
"""Least distance between two names on one side: the logarithm of a ratio."""


def scatter(peaks: Sequence[Peak]) -> Figure:
    """Draw predicted against measured peaks on logarithmic axes; name the models furthest off."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7, 6.6), layout="constrained")
        axes = figure.subplots()
        groups = (
            ("over by more than 5 %", OVER, [p for p in peaks if p.error > CLOSE]),
            ("under by more than 5 %", UNDER, [p for p in peaks if p.error < -CLOSE]),
            ("within 5 %", FINE, [p for p in peaks if abs(p.error) <= CLOSE]),
        )
        for label, colour, members in groups:
            axes.scatter(
                [peak.measured_bytes / GIB for peak in members],
                [peak.predicted_bytes / GIB for peak in members],
                s=16,
                color=colour,
                alpha=0.75,
                linewidths=0,
                label=f"{label}: {len(members)}",
            )
        _name_furthest(axes, peaks)
        values = [b / GIB for p in peaks for b in (p.measured_bytes, p.predicted_bytes)]
        _diagonal(axes, values)
        axes.set_xlabel("measured peak (GiB)")
        axes.set_ylabel("predicted peak (GiB)")
        axes.set_title("Predicted against measured peak")
        axes.legend(loc="upper left")
        return figure


def steps_scatter(points: Sequence[tuple[int, int, str]]) -> Figure:
    """Draw predicted against measured bytes of training steps; a colour for each set."""
    sets = list(dict.fromkeys(name for _, _, name in points))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7, 6.6), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(sets):
            members = [(x / GIB, y / GIB) for x, y, found in points if found == name]
            axes.scatter(
                [x for x, _ in members],
                [y for _, y in members],
                s=16,
                color=_SETS[place % len(_SETS)],
                alpha=0.75,
                linewidths=0,
                label=f"{name}: {len(members)}",
            )
        _diagonal(axes, [value / GIB for x, y, _ in points for value in (x, y)])
        axes.set_xlabel("measured peak (GiB)")
        axes.set_ylabel("predicted peak (GiB)")
        axes.set_title("Predicted against measured peak of training steps")
        axes.legend(loc="upper left")
        return figure


def _name_furthest(axes: Axes, peaks: Sequence[Peak]) -> None:
    """Name the worst row of each of the models that are furthest off, where there is room."""
    named: set[str] = set()
    places: list[tuple[bool, float]] = []
    for peak in sorted(peaks, key=lambda peak: -abs(peak.error)):
        is_over, height = peak.error > 0, log(peak.predicted_bytes)
        is_crowded = any(side == is_over and abs(other - height) < _ROOM for side, other in places)
        if peak.row.run.model in named or abs(peak.error) <= CLOSE or is_crowded:
            continue
        named.add(peak.row.run.model)
        places.append((is_over, height))
        axes.annotate(
            peak.row.run.model,
            (peak.measured_bytes / GIB, peak.predicted_bytes / GIB),
            xytext=(-6, 2) if is_over else (6, -2),
            textcoords="offset points",
            ha="right" if is_over else "left",
            va="bottom" if is_over else "top",
            fontsize=7.5,
            color=FAINT,
        )
        if len(named) == _LABELLED:
            break


def _diagonal(axes: Axes, values: Sequence[float]) -> None:
    low, high = (min(values) / 1.15, max(values) * 1.15) if values else (1.0, 2.0)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.plot([low, high], [low, high], color=INK, linewidth=0.9, zorder=0)
    band = [low * (1 - CLOSE), high * (1 - CLOSE)], [low * (1 + CLOSE), high * (1 + CLOSE)]
    axes.fill_between([low, high], *band, color="#E7EAEF", linewidth=0, zorder=-1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=2, numticks=20))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def families(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw each family's median error, and a line from its lowest to its highest."""
    names = list(found)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 1.5 + 0.21 * max(len(names), 4)), layout="constrained")
        axes = figure.subplots()
        axes.axvspan(-100 * CLOSE, 100 * CLOSE, color="#EEF1F5", linewidth=0, zorder=-2)
        axes.axvline(0, color=INK, linewidth=0.8, zorder=-1)
        for place, facts in enumerate(found.values()):
            middle = 100 * facts["signed_median"]
            colour = OVER if middle > 100 * CLOSE else UNDER if middle < -100 * CLOSE else FINE
            ends = [100 * facts["lowest"], 100 * facts["highest"]]
            axes.plot(ends, [place, place], color=colour, linewidth=2, alpha=0.5)
            axes.plot([middle], [place], "o", color=colour, markersize=5)
        labels = [f"{name} ({found[name]['rows']})" for name in names]
        axes.set_yticks(range(len(names)), labels, fontsize=8.5)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("error (%): median, lowest to highest; shaded: within 5 %")
        axes.set_title("Error by family (rows)")
        axes.tick_params(axis="y", length=0)
        return figure


def ceilings(brackets: Sequence[Bracket]) -> Figure:
    """Draw each bracket as a line, and the predicted ceiling on it or beside it."""
    ordered = sorted(brackets, key=lambda bracket: (bracket.row.micro_batch, bracket.ceiling))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 1.6 + 0.15 * max(len(ordered), 8)), layout="constrained")
        axes = figure.subplots()
        for place, bracket in enumerate(ordered):
            ran, above = bracket.row.micro_batch, bracket.above or LARGEST
            axes.plot(
                [ran, above],
                [place, place],
                color="#B8C0CC",
                linewidth=4,
                zorder=1,
                solid_capstyle="butt",
            )
        for verdict, colour in _COLOURS.items():
            members = [(b.ceiling, i) for i, b in enumerate(ordered) if b.verdict == verdict]
            axes.scatter(
                [max(ceiling, 1) for ceiling, _ in members],
                [place for _, place in members],
                s=18,
                color=colour,
                zorder=2,
                label=f"{verdict}: {len(members)}",
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_yticks(range(len(ordered)), [b.row.run.model for b in ordered], fontsize=6.5)
        axes.set_ylim(len(ordered) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("micro-batch: the bracket that was measured, and the predicted ceiling")
        axes.set_title("Predicted ceiling against measured bracket")
        figure.legend(loc="outside lower center", ncols=3)
        return figure


def verdicts(brackets: Sequence[Bracket]) -> Figure:
    """Draw how many ceilings of each family lie inside, below and above."""
    counted: dict[str, Counter[Verdict]] = defaultdict(Counter)
    for bracket in brackets:
        counted[bracket.family][bracket.verdict] += 1
    names = sorted(
        counted, key=lambda name: (counted[name]["inside"] / counted[name].total(), name)
    )
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 1.6 + 0.21 * max(len(names), 4)), layout="constrained")
        axes = figure.subplots()
        left = [0] * len(names)
        for verdict, colour in _COLOURS.items():
            widths = [counted[name][verdict] for name in names]
            axes.barh(range(len(names)), widths, left=left, height=0.7, color=colour, label=verdict)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(names)), names, fontsize=8.5)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("models")
        axes.set_title("Ceilings by family")
        figure.legend(loc="outside lower center", ncols=3)
        return figure
