"""Charts of a run: matplotlib is asked for here alone."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from autobatch.report.charts.frame import INK
from autobatch.support.units import GIB
from reports.common.charts import INDIGO, ROSE, SAND, STYLE, TEAL
from reports.common.journal import Record
from reports.fidelity.results import NEAR, worst

_COLOURS = {"timm": INDIGO, "transformers": ROSE, "torchvision": TEAL, "recurrent": SAND}
_LEAST = 1e-6
"""Errors below this are drawn here: a logarithmic axis has no zero."""


def scatter(compared: Sequence[Record]) -> Figure:
    """Draw every row: what PyTorch reserves against by how much the prediction is off."""
    with mpl.rc_context(dict(STYLE)):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for library, colour in _COLOURS.items():
            rows = [r for r in compared if r["model"].startswith(f"{library}:")]
            if rows:
                axes.scatter(
                    [row["bench_bytes"][1] / GIB for row in rows],
                    [max(worst(row), _LEAST) for row in rows],
                    s=14,
                    color=colour,
                    alpha=0.7,
                    linewidth=0,
                    label=f"{library} ({len(rows)})",
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(_LEAST / 2, max(0.02, *map(worst, compared)) * 2 if compared else 0.02)
        axes.axhline(NEAR, color=INK, linewidth=0.9, linestyle="--")
        axes.annotate(
            "0.05 %", (1, NEAR), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(
            FuncFormatter(
                lambda value, _: (
                    "0.0001 % or less"
                    if value <= _LEAST
                    else f"{value:.5%}".rstrip("0%").rstrip(".") + " %"
                )
            )
        )
        axes.set_xlabel("reserved at the peak on the simulated runtime, GiB")
        axes.set_title("Larger error of allocated and reserved peaks, every row", fontsize=10.5)
        figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=4)
        return figure
