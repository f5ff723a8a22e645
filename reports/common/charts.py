"""The look of the charts, and how they are saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from autobatch.report.charts.frame import FAINT, INK

# Paul Tol's "muted" scheme: distinguishable with any common colour blindness.
INDIGO, ROSE, TEAL, CYAN, SAND = "#332288", "#CC6677", "#44AA99", "#88CCEE", "#DDCC77"

STYLE: Mapping[str, Any] = {
    "font.size": 9.5,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.hashsalt": "autobatch",
}


def write(figure: Figure, stem: Path) -> None:
    """Save a figure beside `stem` as PNG and SVG, the same bytes for the same figures."""
    with mpl.rc_context(dict(STYLE)):
        figure.savefig(stem.with_suffix(".png"), dpi=150, metadata={"Software": None})
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
