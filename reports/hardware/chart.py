"""The chart of a document: errors of predicted peaks, by workload."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from autobatch.report.charts.frame import INK
from reports.common.charts import CYAN, INDIGO, ROSE, SAND
from reports.hardware.facts import Facts, at_ceiling, error_at_ceiling, virtual_error

_EXTRAPOLATED = partial(error_at_ceiling, source="foretold")

_SERIES = (
    ("extrapolated, allocated", INDIGO, partial(_EXTRAPOLATED, what="allocated_bytes")),
    ("extrapolated, reserved", CYAN, partial(_EXTRAPOLATED, what="reserved_bytes")),
    ("virtual, allocated", ROSE, partial(virtual_error, what="allocated_bytes")),
    ("virtual, reserved", SAND, partial(virtual_error, what="reserved_bytes")),
)


def draw(document: Facts, path: Path) -> None:
    """Draw the errors at the largest size as bars, and save them as SVG."""
    rows = [row for row in document["workloads"] if at_ceiling(row)]
    with mpl.rc_context({"svg.hashsalt": "autobatch", "font.size": 9}):
        figure = Figure(figsize=(8, 2 + 0.42 * len(rows)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for place, (label, colour, error_of) in enumerate(_SERIES):
            errors = [(i, error_of(row)) for i, row in enumerate(rows)]
            known = [(i, 100 * error) for i, error in errors if error is not None]
            axes.barh(
                [i + 0.2 * (place - 1.5) for i, _ in known],
                [error for _, error in known],
                height=0.18,
                color=colour,
                label=label,
            )
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.invert_yaxis()
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("predicted beside measured peak (%)")
        axes.set_title(f"{document['device']['name']}, torch {document['device']['torch']}")
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, metadata={"Date": None})
