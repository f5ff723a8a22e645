"""The drawings beside a report: what a plan's page draws, each as an SVG that stands alone.

Invariant: no text in a drawing is cut or covers another, and every string of the plan is escaped. A
drawing has one size and a white ground; one that adapts shrinks with the page that it is put into,
and takes the ink and the ground from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from autobatch.records.footprint import Footprint
from autobatch.records.plan_record import PlanRecord
from autobatch.report.colours import BAND, BUDGET, CATEGORIES, FAINT, GREEN, GRID, GROUND, INK, TEAL
from autobatch.report.document import printable
from autobatch.report.page import figures
from autobatch.report.page.figures import Bar, Tick
from autobatch.support.units import format_bytes

__all__ = ["breakdown", "memory", "timeline"]

_PHASES = {
    "setup": "#d9d9d9",
    "inputs": "#a6a6a6",
    "forward": "#9dc3e6",
    "backward": "#f4b183",
    "step": "#7a6fac",
    "evaluate": "#c5e0b4",
}
_EVIDENCE = {"measured": GREEN, "simulated": GREEN, "predicted": TEAL}
_OTHER = "#eeeeee"
_ON_DARK, _ON_LIGHT = GROUND, "#000000"

_ADAPTED = {
    ("fill", INK): ("currentColor", 1),
    ("stroke", INK): ("currentColor", 1),
    ("fill", FAINT): ("currentColor", 0.75),
    ("stroke", GRID): ("currentColor", 0.2),
    ("fill", BUDGET): ("currentColor", 1),
    ("stroke", BUDGET): ("#d93025", 1),
}
"""What stands for a paint, and how opaque, where the ground may be light or dark. No red can be
read well on both, so that only the budget's line is red, and its name is not."""

_WIDTH, _LEFT, _RIGHT = 860, 92, 836
_SMALL, _SIZE, _LARGE = 11, 12, 17
_WIDEST = 0.62
"""A character's width as a share of the font's size, of which no line of text has more."""


class _Key(NamedTuple):
    """What a colour, a line or a mark stands for; `kind` is one of them."""

    kind: str
    colour: str
    name: str


class _Box(NamedTuple):
    """Where a figure's drawing lies on the sheet."""

    top: float
    height: float
    left: float = _LEFT

    def x(self, percent: float) -> float:
        return self.left + (_RIGHT - self.left) * percent / 100

    def y(self, percent: float) -> float:
        return self.top + self.height * percent / 100


class _Sheet:
    """Collects the elements of one drawing, from the back to the front."""

    def __init__(self, title: str, *, adapts: bool = False) -> None:
        self._title = title
        self._adapts = adapts
        self._parts: list[str] = []
        self.text(16, 28, title, size=_LARGE, bold=True)

    def rect(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" '
            f"{self._paint('fill', colour)}{self._edge()}/>"
        )

    def line(
        self, x: float, y: float, to_x: float, to_y: float, colour: str, dashes: str = ""
    ) -> None:
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._parts.append(
            f'<path d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}" '
            f"{self._paint('stroke', colour)}{dashed}/>"
        )

    def figure(self, box: _Box, path: str, style: str) -> None:
        """Draw a path of a figure, whose own coordinates are stretched to the box."""
        across, down = (_RIGHT - box.left) / figures.WIDTH, box.height / figures.HEIGHT
        self._parts.append(
            f'<path transform="matrix({across:.4f} 0 0 {down:.4f} {box.left} {box.top})" '
            f'd="{path}" vector-effect="non-scaling-stroke" {style}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        colour: str = INK,
        anchor: str = "start",
        size: int = _SIZE,
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" {self._paint("fill", colour)} '
            f'text-anchor="{anchor}"{weight}>{escape(printable(text))}</text>'
        )

    def mark(self, kind: str, x: float, y: float, colour: str) -> None:
        """Draw a mark of a key: a dot, a diamond or a ring."""
        if kind == "diamond":
            shape = f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5Z" fill="{colour}"/>'
        elif kind == "ring":
            shape = (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="none" stroke="{colour}" '
                'stroke-width="2.5"/>'
            )
        else:
            shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
        self._parts.append(shape)

    def rows(self, box: _Box, ticks: Sequence[Tick]) -> None:
        """Draw the lines and labels of a vertical axis."""
        for tick in ticks:
            y = box.y(tick.at)
            self.line(box.left, y, _RIGHT, y, GRID)
            self.text(box.left - 8, y + 4, tick.text, colour=FAINT, anchor="end", size=_SMALL)

    def columns(self, box: _Box, ticks: Sequence[Tick], name: str) -> None:
        """Draw the lines and labels of a horizontal axis, and what it shows."""
        for tick in ticks:
            x = box.x(tick.at)
            self.line(x, box.top, x, box.y(100), GRID)
            self.text(x, box.y(100) + 16, tick.text, colour=FAINT, anchor="middle", size=_SMALL)
        self.text((box.left + _RIGHT) / 2, box.y(100) + 34, name, colour=FAINT, anchor="middle")

    def legend(self, y: float, keys: Sequence[_Key], left: float = _LEFT) -> float:
        """Write what colours, lines and marks stand for; return where the sheet ends below."""
        x = left
        for key in keys:
            width = 24 + _width(key.name) + 14
            if x + width > _WIDTH and x > left:
                x, y = left, y + 20
            if key.kind == "area":
                self.rect(x, y - 10, 14, 11, key.colour)
            elif key.kind in ("line", "dashes", "dots"):
                dashes = {"line": "", "dashes": "5 4", "dots": "2 3"}[key.kind]
                self.line(x, y - 4, x + 18, y - 4, key.colour, dashes)
            else:
                self.mark(key.kind, x + 9, y - 4, key.colour)
            self.text(x + 24, y, key.name)
            x += width
        return y + 16

    def svg(self, height: float) -> str:
        """Return the drawing, which ends at a height."""
        ground = f'<rect width="{_WIDTH}" height="{height:.0f}" fill="{GROUND}"/>'
        fluid = ' style="max-width:100%;height:auto"'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height:.0f}" '
            f'viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
            'font-family="system-ui, Segoe UI, Roboto, Helvetica, Arial, sans-serif"'
            f"{fluid if self._adapts else ''}>"
            f"<title>{escape(self._title)}</title>"
            f"{'' if self._adapts else ground}{''.join(self._parts)}</svg>\n"
        )

    def _paint(self, kind: str, colour: str) -> str:
        """Return the attributes that paint the inside, "fill", or the line, "stroke"."""
        shown, share = _ADAPTED.get((kind, colour), (colour, 1)) if self._adapts else (colour, 1)
        return f'{kind}="{shown}"' + (f' {kind}-opacity="{share}"' if share < 1 else "")

    def _edge(self) -> str:
        """Return the attributes of an edge by which areas stand out from a ground like them."""
        return ' stroke="currentColor" stroke-opacity="0.4"' if self._adapts else ""


def memory(plan: PlanRecord) -> str:
    """Draw reserved memory against the micro-batch, with the budget, the plan and the ceiling."""
    sheet = _Sheet("Memory against micro-batch")
    curve = figures.curve(plan)
    if curve is None:
        return _nothing(sheet, "The plan knows fewer than two micro-batches.")
    box = _Box(76, 290)
    sheet.rows(box, curve.rows)
    sheet.columns(box, curve.columns, "micro-batch (samples in one forward and backward pass)")
    keys = [_Key("line", BAND, "reserved at the peak")]
    if curve.band:
        sheet.figure(box, curve.band, f'fill="{BAND}" fill-opacity="0.16"')
        keys.append(_Key("area", "#dae4f5", "nine of ten runs"))
    sheet.figure(box, curve.line, f'fill="none" stroke="{BAND}" stroke-width="2"')
    for at, colour, dashes in ((curve.budget, BUDGET, "5 4"), (curve.capacity, FAINT, "2 3")):
        sheet.line(_LEFT, box.y(at), _RIGHT, box.y(at), colour, dashes)
    usable = plan.gpu.capacity_bytes - plan.footprint.context_bytes - plan.others_bytes
    keys.append(_Key("dashes", BUDGET, f"budget {format_bytes(plan.budget_bytes)}"))
    keys.append(_Key("dots", FAINT, f"all that is usable {format_bytes(usable)}"))
    kinds = {evidence: "dot" if evidence == "predicted" else "diamond" for evidence in _EVIDENCE}
    for point in curve.points:
        kind, colour = kinds[point.evidence], _EVIDENCE[point.evidence]
        sheet.mark(kind, box.x(point.left), box.y(point.top), colour)
    known = {point.evidence for point in curve.points}
    keys += [_Key(kinds[each], _EVIDENCE[each], each) for each in _EVIDENCE if each in known]
    sheet.mark("ring", box.x(curve.plan[0]), box.y(curve.plan[1]), CATEGORIES["parameters"])
    reserved = format_bytes(plan.footprint.peak_reserved_bytes)
    keys.append(_Key("ring", CATEGORIES["parameters"], f"the plan, {reserved}"))
    chosen, ceiling = plan.footprint.micro_batch, plan.ceiling_at_least
    names = [(curve.plan[0], f"plan {chosen:,}", CATEGORIES["parameters"])]
    if ceiling == chosen:
        names = [(curve.plan[0], f"plan = {_ceiling(plan)} {chosen:,}", CATEGORIES["parameters"])]
    else:
        names.append((curve.ceiling[0], f"{_ceiling(plan)} {ceiling:,}", INK))
    _name_lines(sheet, box, names)
    return sheet.svg(sheet.legend(box.y(100) + 60, keys))


def breakdown(plan: PlanRecord, *, adapts: bool = False) -> str:
    """Draw what is on the device at the peak, and at the ceiling's where that is another size.

    Args:
        plan: the answer.
        adapts: to the width, the ink and the ground of the page that the drawing is put into.
    """
    sheet = _Sheet("Memory at the peak", adapts=adapts)
    chosen, ceiling = plan.footprint, plan.ceiling_footprint
    rows: list[tuple[str, Footprint]] = [(f"plan {chosen.micro_batch:,}", chosen)]
    if ceiling.micro_batch != chosen.micro_batch:
        rows.append((f"{_ceiling(plan)} {ceiling.micro_batch:,}", ceiling))
    whole = max(figures.bar(plan, footprint).whole_bytes for _, footprint in rows)
    bars = [figures.bar(plan, footprint, whole_bytes=whole) for _, footprint in rows]
    left = max(_LEFT, 16 + max(_width(name) for name, _ in rows))
    box = _Box(76, 76 * len(rows), left)
    sheet.columns(box, figures.byte_columns(whole), "on the device, CUDA context included")
    for index, ((name, footprint), bar) in enumerate(zip(rows, bars, strict=True)):
        top = box.top + 76 * index + 12
        taken = format_bytes(footprint.peak_device_bytes + plan.others_bytes)
        sheet.text(left - 8, top + 17, name, anchor="end")
        sheet.text(left - 8, top + 33, taken, anchor="end", size=_SMALL, colour=FAINT)
        _draw_bar(sheet, box, top, bar)
    budget, capacity = bars[0].budget, bars[0].capacity
    ends = plan.footprint.context_bytes + plan.others_bytes + plan.budget_bytes
    _name_lines(
        sheet,
        box,
        [
            (budget, f"the budget ends at {format_bytes(ends)}", BUDGET),
            (capacity, f"capacity {format_bytes(plan.gpu.capacity_bytes)}", INK),
        ],
    )
    used = {part.name for bar in bars for part in bar.parts}
    keys = [_Key("area", colour, name) for name, colour in CATEGORIES.items() if name in used]
    if any(bar.low is not None for bar in bars):
        keys.append(_Key("line", INK, "nine of ten runs end in here"))
    return sheet.svg(sheet.legend(box.y(100) + 60, keys, left))


def timeline(plan: PlanRecord) -> str:
    """Draw live bytes by category over the traced windows, with what ran above them."""
    sheet = _Sheet("Memory over the training windows")
    figure = figures.timeline(plan)
    if figure is None:
        return _nothing(sheet, "The plan has no timeline.")
    box = _Box(88, 300)
    sheet.rows(box, figure.rows)
    for name, path in figure.areas:
        sheet.figure(box, path, f'fill="{CATEGORIES.get(name, _OTHER)}"')
    stroke = f'fill="none" stroke="{BUDGET}" stroke-width="1.5" stroke-dasharray="5 4"'
    sheet.figure(box, figure.reserved, stroke)
    _draw_phases(sheet, box, figure.phases)
    peak = box.x(figure.peak)
    sheet.line(peak, box.top, peak, box.y(100), INK)
    text = f"peak {format_bytes(plan.footprint.peak_allocated_bytes)} allocated"
    at, anchor = (peak - 5, "end") if figure.peak > 50 else (peak + 5, "start")
    sheet.text(at, box.top + 13, text, anchor=anchor, bold=True)
    sheet.text(
        (_LEFT + _RIGHT) / 2,
        box.y(100) + 20,
        "allocations and frees, in order",
        colour=FAINT,
        anchor="middle",
    )
    shown = {name for name, _ in figure.areas}
    ran = {phase.name for phase in figure.phases}
    keys = [
        _Key("dashes", BUDGET, "reserved by the allocator"),
        *(_Key("area", colour, name) for name, colour in CATEGORIES.items() if name in shown),
        *(
            _Key("area", colour, f"{name} (phase)")
            for name, colour in _PHASES.items()
            if name in ran
        ),
    ]
    return sheet.svg(sheet.legend(box.y(100) + 46, keys))


def _draw_bar(sheet: _Sheet, box: _Box, top: float, bar: Bar) -> None:
    for part in bar.parts:
        left, width = box.x(part.left), box.x(part.left + part.width) - box.x(part.left)
        colour = CATEGORIES.get(part.name, _OTHER)
        sheet.rect(left, top, width, 40, colour)
        if width > 8 + max(_width(part.name), _width(part.text)):
            ink, middle = _ink_on(colour), left + width / 2
            sheet.text(middle, top + 17, part.name, colour=ink, anchor="middle", bold=True)
            sheet.text(middle, top + 33, part.text, colour=ink, anchor="middle")
    if bar.low is not None and bar.high is not None:
        low, high, y = box.x(bar.low), box.x(bar.high), top + 49
        sheet.line(low, y, high, y, INK)
        for end in (low, high):
            sheet.line(end, y - 4, end, y + 4, INK)


def _draw_phases(sheet: _Sheet, box: _Box, phases: Sequence[figures.Part]) -> None:
    """Draw each phase as a block above the figure, and the windows' numbers above these."""
    windows: dict[str, list[float]] = {}
    for phase in phases:
        left, right = box.x(phase.left), box.x(phase.left + phase.width)
        colour = _PHASES.get(phase.name, _OTHER)
        sheet.rect(left, box.top - 24, right - left, 20, colour)
        if right - left > _width(phase.name, _SMALL) + 4:
            middle, ink = (left + right) / 2, _ink_on(colour)
            y = box.top - 10
            sheet.text(middle, y, phase.name, colour=ink, anchor="middle", size=_SMALL)
        if phase.name != "setup":
            windows.setdefault(phase.text.partition(",")[0], []).extend((left, right))
    for name, edges in windows.items():
        if max(edges) - min(edges) > _width(name):
            middle = (min(edges) + max(edges)) / 2
            sheet.text(middle, box.top - 30, name, anchor="middle", colour=FAINT)


def _name_lines(sheet: _Sheet, box: _Box, lines: Sequence[tuple[float, str, str]]) -> None:
    """Draw one or two vertical lines at percentages, from left to right, with names above them.

    A name stands beside its line at a height at which the other line does not run.
    """
    left, *others = sorted(lines)
    is_beside = bool(others) and box.x(left[0]) - 4 >= _width(left[1])  # else to its right
    heights = (7, 22) if is_beside else (22, 7)
    for line, height in zip((left, *others), heights, strict=False):
        at, text, colour = line
        x, y = box.x(at), box.top - height
        sheet.line(x, y - 10, x, box.y(100), colour, "4 3")
        to_right = x + 4 + _width(text) <= _WIDTH and not (is_beside and line is left)
        anchor = "start" if to_right else "end"
        sheet.text(x + 4 if to_right else x - 4, y, text, colour=colour, anchor=anchor)


def _nothing(sheet: _Sheet, why: str) -> str:
    sheet.text(16, 60, why, colour=FAINT)
    return sheet.svg(80)


def _ceiling(plan: PlanRecord) -> str:
    return "ceiling" if plan.ceiling is not None else "at least"


def _width(text: str, size: int = _SIZE) -> float:
    return _WIDEST * size * len(printable(text))


def _ink_on(colour: str) -> str:
    """Return white for text on a dark colour, black on a light one."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return _ON_DARK if 0.299 * red + 0.587 * green + 0.114 * blue < 128 else _ON_LIGHT
