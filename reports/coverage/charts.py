"""Charts of a run: matplotlib is asked for here alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log2

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from autobatch.report.charts.frame import INK
from reports.common.charts import INDIGO, ROSE, STYLE

_COLOURS = {"timm": INDIGO, "transformers": ROSE}
_PER_DOUBLING = 4


def histograms(
    values: Mapping[str, Sequence[float]], *, label: str, title: str, target: float | None = None
) -> Figure:
    """Draw a histogram of each library below the other, on one logarithmic axis.

    Args:
        values: positive figures by library.
        label: of the axis, with the unit.
        title: of the chart.
        target: drawn as a line.
    """
    known = {name: figures for name, figures in values.items() if figures}
    everything = [value for figures in known.values() for value in figures] or [1.0]
    if target is not None:
        everything.append(target)
    low, high = floor(log2(min(everything))), ceil(log2(max(everything))) or 1
    steps = max(high - low, 1) * _PER_DOUBLING
    edges = [2 ** (low + step / _PER_DOUBLING) for step in range(steps + 1)]
    with mpl.rc_context(dict(STYLE)):
        figure = Figure(figsize=(7.5, 1 + 1.7 * max(len(known), 1)), layout="constrained")
        rows = figure.subplots(max(len(known), 1), squeeze=False, sharex=True)[:, 0]
        for axes, (name, figures) in zip(rows, known.items(), strict=False):
            axes.hist(figures, bins=edges, color=_COLOURS[name], edgecolor="white", linewidth=0.4)
            axes.set_title(f"{name} ({len(figures)})", fontsize=9.5)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            if target is not None:
                axes.axvline(target, color=INK, linewidth=0.9, linestyle="--")
        rows[-1].set_xscale("log", base=2)
        rows[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        rows[-1].xaxis.set_minor_locator(NullLocator())
        rows[-1].xaxis.set_minor_formatter(NullFormatter())
        rows[-1].set_xlabel(label)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        return figure
