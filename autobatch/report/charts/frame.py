"""What all charts share: style, axes, legend, and saving as PNG and SVG.

Invariant: pyplot and the user's settings of matplotlib are never touched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from autobatch.errors import FileError
from autobatch.report.colours import FAINT, GRID, GROUND, INK
from autobatch.support.files import write_text
from autobatch.support.units import GIB, MIB

__all__ = [
    "add_legend",
    "byte_unit",
    "name_lines",
    "new_figure",
    "save",
    "save_svg",
    "style",
]

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
    "grid.color": GRID,
    "legend.frameon": False,
    "svg.fonttype": "path",
}
_WIDTH = 8.6
"""Of every chart, in inches."""


@contextmanager
def style() -> Iterator[None]:
    """Apply the style of all charts, and restore the user's settings at the end."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def new_figure(
    title: str, height: float, *, bottom: float, left: float = 0.11
) -> tuple[Figure, Axes]:
    """Return a titled figure of a height in inches, and its axes.

    `bottom` and `left` are the edges of the axes as shares of the figure.
    """
    figure = Figure(figsize=(_WIDTH, height), facecolor=GROUND)
    top = 1 - 0.72 / height
    axes = figure.add_axes((left, bottom, 0.97 - left, top - bottom))
    figure.text(0.02, 1 - 0.12 / height, title, va="top", fontsize=12, fontweight="bold")
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    return figure, axes


def name_lines(axes: Axes, lines: Sequence[tuple[float, str, str]]) -> None:
    """Draw vertical lines, each given as (x, name, colour), with their names above the axes.

    The leftmost line's name ends at the line, the others' begin there: two names cannot overlap.
    """
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


def add_legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    """Put a legend below the axes."""
    figure.legend(
        handles=list(handles),
        loc="lower left",
        bbox_to_anchor=(0.09, 0.005),
        ncols=3,
        fontsize=8.5,
        columnspacing=1.3,
        handlelength=1.6,
    )


def byte_unit(top_bytes: float) -> tuple[str, int]:
    """Return the unit for an axis that ends at `top_bytes`: its name and its size in bytes."""
    return ("GiB", GIB) if top_bytes >= GIB else ("MiB", MIB)


def save_svg(figure: Figure, folder: Path, name: str) -> str:
    """Write NAME.svg, and return it for inlining.

    Raises:
        FileError: the file cannot be written.
    """
    svg = _svg(figure, name)
    write_text(folder / f"{name}.svg", svg)
    return svg[svg.index("<svg") :]


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write NAME.png and NAME.svg, and return the SVG for inlining.

    Raises:
        FileError: a file cannot be written.
    """
    try:
        FigureCanvasAgg(figure)
        figure.savefig(folder / f"{name}.png", format="png", dpi=160)
    except OSError as error:
        raise FileError(
            f"cannot write {name}.png into {str(folder)!r}: {error.strerror}; name another folder"
        ) from error
    return save_svg(figure, folder, name)


def _svg(figure: Figure, name: str) -> str:
    """Render as SVG: the same bytes every time, and ids that stay unique on a page of charts."""
    mpl.rcParams["svg.hashsalt"] = name
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", buffer.getvalue())
