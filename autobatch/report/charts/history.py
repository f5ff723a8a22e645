"""The chart of a recording: what was held over time, and what the allocator had reserved for it."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from autobatch.records.explanation import DeviceExplanation, History
from autobatch.report.charts.frame import add_legend, byte_unit, name_lines, new_figure
from autobatch.report.colours import (
    BUDGET,
    CATEGORIES,
    CYAN,
    GREEN,
    INDIGO,
    INK,
    OLIVE,
    PURPLE,
    SILVER,
    SLATE,
    WINE,
)
from autobatch.report.document import printable
from autobatch.support.units import format_bytes

__all__ = ["draw_history"]

_SHOWN = 7
"""Categories with an area of their own; the smallest share one."""

_OTHERS = (SLATE, CYAN, PURPLE, GREEN, OLIVE, WINE, INDIGO, SILVER)
"""Colours of categories that plans do not have."""


def draw_history(device: DeviceExplanation) -> Figure:
    """Draw what a device's recording held by category, the reserve, the peak and a failed request.

    The device has a history, in which something was reserved.
    """
    history = device.history
    assert history is not None
    unit, size = byte_unit(max(history.reserved_bytes))
    figure, axes = new_figure("Memory over the recording", 4.6, bottom=0.29)
    areas = _areas(history)
    free = iter(_OTHERS)
    shades = [CATEGORIES.get(name) or next(free) for name, _ in areas]
    if areas:  # a cache may hold nothing but free blocks
        axes.stackplot(
            history.events,
            *([held / size for held in each] for _, each in areas),
            colors=shades,
            step="post",
        )
    reserved = [each / size for each in history.reserved_bytes]
    axes.step(history.events, reserved, where="post", color=BUDGET, lw=1.4, ls=(0, (5, 4)))
    marks = []
    if device.moment_event is not None:
        peak = format_bytes(device.reserve.allocated_bytes)
        marks.append((device.moment_event, f"peak {peak} allocated", INK))
    if device.shortage is not None:
        asked = format_bytes(device.shortage.requested_bytes)
        marks.append((device.shortage.event, f"no memory for {asked}", BUDGET))
    name_lines(axes, marks)
    axes.set(
        xlabel="recorded events, in order",
        ylabel=unit,
        xlim=(history.events[0], max(history.events[-1], history.events[0] + 1)),
        ylim=(0, 1.05 * max(reserved)),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=BUDGET, lw=1.4, ls=(0, (5, 4)), label="reserved"),
        *(Patch(color=shade, label=name) for shade, (name, _) in zip(shades, areas, strict=True)),
    ]
    add_legend(figure, handles)
    return figure


def _areas(history: History) -> list[tuple[str, tuple[int, ...]]]:
    """Return what is drawn, the lowest first: what was there first carries what came later."""
    held = [(printable(name), each) for name, each in history.held_bytes if any(each)]
    areas, rest = held[:_SHOWN], held[_SHOWN:]
    if rest:
        areas.append(("all others", tuple(map(sum, zip(*(each for _, each in rest), strict=True)))))
    return sorted(areas, key=lambda area: next((i, -b) for i, b in enumerate(area[1]) if b))
