"""The drawings that a plan's page has without its scripts: shares of their width and height.

Invariant: shapes are numbers and labels are text beside them, so that a label is read, found and
printed as text, and has one size on every screen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from autobatch.gpus.uncertainty import peak_range
from autobatch.records.evidence import MemoryPoint
from autobatch.records.footprint import Evidence, Footprint
from autobatch.records.plan_record import PlanRecord
from autobatch.report.document import printable
from autobatch.support.units import GIB, MIB, format_bytes

__all__ = [
    "Bar",
    "CurveFigure",
    "CurvePoint",
    "Part",
    "Tick",
    "TimelineFigure",
    "bar",
    "byte_columns",
    "curve",
    "timeline",
]

_Scale = Callable[[float], float]

WIDTH, HEIGHT = 1000, 300
"""Of the drawings' own coordinates; a page stretches them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the device's memory; `left` and `width` are percentages of the capacity."""

    name: str
    text: str
    left: float
    width: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A label at a percentage of an axis."""

    at: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """What is on the device at the peak, against its capacity, in percent of the axis.

    Attributes:
        whole_bytes: where the axis ends.
        low, high: what the device holds in nine of ten runs; None where it was measured.
    """

    whole_bytes: int
    parts: tuple[Part, ...]
    budget: float
    capacity: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A point of the curve, in percent of the box, and how it is known."""

    left: float
    top: float
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveFigure:
    """Reserved memory against the micro-batch, as paths in a box of WIDTH by HEIGHT."""

    points: tuple[CurvePoint, ...]

    line: str
    band: str
    budget: float
    capacity: float
    plan: tuple[float, float]
    ceiling: tuple[float, float]
    rows: tuple[Tick, ...]
    columns: tuple[Tick, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineFigure:
    """Live bytes over the traced windows, as paths in a box of WIDTH by HEIGHT.

    Attributes:
        areas: names of categories, and what they and those below them take; the topmost first.
        phases: what ran, from where to where, in percent.
    """

    areas: tuple[tuple[str, str], ...]
    reserved: str
    peak: float
    phases: tuple[Part, ...]
    rows: tuple[Tick, ...]


def bar(
    plan: PlanRecord, footprint: Footprint | None = None, *, whole_bytes: int | None = None
) -> Bar:
    """Return the bar of the device at a peak, the plan's if no other is given.

    Args:
        plan: of which it is.
        footprint: of the plan's or of its ceiling's micro-batch.
        whole_bytes: where the axis ends; by default, where all that is drawn does.
    """
    footprint = footprint or plan.footprint
    sizes = {
        "other processes": plan.others_bytes,
        "context": footprint.context_bytes,
        **footprint.categories,
        "cached": footprint.cached_bytes,
    }
    high_bytes = footprint.high_device_bytes or 0
    whole = whole_bytes or max(
        plan.gpu.capacity_bytes, sum(sizes.values()), high_bytes + plan.others_bytes
    )
    ends = list(accumulate(max(size, 0) for size in sizes.values()))
    scale = 100 / whole
    low, high = (
        None if size is None else scale * (size + plan.others_bytes)
        for size in (footprint.low_device_bytes, footprint.high_device_bytes)
    )
    return Bar(
        whole_bytes=whole,
        parts=tuple(
            Part(
                name=name,
                text=format_bytes(size),
                left=scale * (end - size),
                width=scale * size,
            )
            for (name, size), end in zip(sizes.items(), ends, strict=True)
            if size > 0
        ),
        budget=scale * (footprint.context_bytes + plan.others_bytes + plan.budget_bytes),
        capacity=scale * plan.gpu.capacity_bytes,
        low=low,
        high=high,
    )


def curve(plan: PlanRecord) -> CurveFigure | None:
    """Return the curve of a plan; None where it has fewer than two points."""
    points = plan.curve
    if len(points) < 2:
        return None
    usable = plan.gpu.capacity_bytes - plan.footprint.context_bytes - plan.others_bytes
    widest = max(point.micro_batch for point in points) * 1.04
    top = max(usable, *(point.peak_reserved_bytes for point in points)) * 1.06

    def x(micro_batch: float) -> float:
        return WIDTH * micro_batch / widest

    def y(size_bytes: float) -> float:
        return HEIGHT * (1 - min(size_bytes / top, 1))

    def at(of: Footprint | MemoryPoint) -> tuple[float, float]:
        return 100 * x(of.micro_batch) / WIDTH, 100 * y(of.peak_reserved_bytes) / HEIGHT

    places = [(*at(point), point.evidence) for point in points]
    return CurveFigure(
        points=tuple(
            CurvePoint(left=left, top=top, evidence=evidence) for left, top, evidence in places
        ),
        line=_line([(x(p.micro_batch), y(p.peak_reserved_bytes)) for p in points]),
        band=_band(plan, points, x, y),
        budget=100 * y(plan.budget_bytes) / HEIGHT,
        capacity=100 * y(usable) / HEIGHT,
        plan=at(plan.footprint),
        ceiling=at(plan.ceiling_footprint),
        rows=_rows(top),
        columns=tuple(
            Tick(at=100 * size / widest, text=f"{size:,}") for size in _round_steps(widest, 6)
        ),
    )


def timeline(plan: PlanRecord) -> TimelineFigure | None:
    """Return the timeline of a plan; None where it has none."""
    samples, marks = plan.timeline.samples, plan.timeline.marks
    if len(samples) < 2:
        return None
    first, last = samples[0].event, max(samples[-1].event, samples[0].event + 1)
    top = max(max(sample.reserved_bytes for sample in samples), 1) * 1.06
    names = [
        name
        for name in plan.footprint.categories
        if any(sample.categories.get(name) for sample in samples)
    ]

    def x(event: int) -> float:
        return WIDTH * (event - first) / (last - first)

    def y(size_bytes: float) -> float:
        return HEIGHT * (1 - size_bytes / top)

    def steps(sizes: Sequence[int]) -> list[tuple[float, float]]:
        return [(x(s.event), y(size)) for s, size in zip(samples, sizes, strict=True)]

    stacked = [0] * len(samples)
    areas = []
    for name in names:
        stacked = [
            sum_below + sample.categories.get(name, 0)
            for sum_below, sample in zip(stacked, samples, strict=True)
        ]
        areas.append((name, f"{_stairs(steps(stacked))}V{HEIGHT}H0Z"))
    ends = [*(mark[0] for mark in marks[1:]), last]
    return TimelineFigure(
        areas=tuple(reversed(areas)),
        reserved=_stairs(steps([sample.reserved_bytes for sample in samples])),
        peak=x(plan.timeline.peak_event) / WIDTH * 100,
        phases=tuple(
            Part(
                name=printable(phase),
                text=_where(phase, window, micro_batch),
                left=x(event) / WIDTH * 100,
                width=(x(end) - x(event)) / WIDTH * 100,
            )
            for (event, phase, window, micro_batch), end in zip(marks, ends, strict=True)
            if end > event
        ),
        rows=_rows(top),
    )


def _where(phase: str, window: int, micro_batch: int) -> str:
    """Name the window of a phase and, where it belongs to one, the micro-batch."""
    if phase == "setup":
        return f"before window {window + 1}"
    of = "" if phase in ("step", "evaluate") else f", micro-batch {micro_batch + 1}"
    return f"window {window + 1}{of}"


def _band(plan: PlanRecord, points: Sequence[MemoryPoint], x: _Scale, y: _Scale) -> str:
    """Return the range in which nine of ten runs lie; nothing where a GPU was measured."""
    kind = plan.footprint.kind
    if plan.footprint.low_device_bytes is None or kind is None:
        return ""
    ranges = [peak_range(point.peak_reserved_bytes, 0, kind) for point in points]
    there = [(x(p.micro_batch), y(high)) for p, (_, high) in zip(points, ranges, strict=True)]
    back = [(x(p.micro_batch), y(low)) for p, (low, _) in zip(points, ranges, strict=True)]
    return f"{_line([*there, *reversed(back)])}Z"


def _line(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.4g} {y:.4g}" for x, y in points)


def _stairs(points: Sequence[tuple[float, float]]) -> str:
    (left, height), *rest = points
    path = f"M{left:.4g} {height:.4g}"
    for x, y in rest:
        path += f"H{x:.4g}"
        if f"{y:.4g}" != f"{height:.4g}":
            path += f"V{y:.4g}"
            height = y
    return path


def byte_columns(end: float) -> tuple[Tick, ...]:
    """Return labels of an axis of bytes from 0 % to `end`, which lies at 100 %."""
    name, unit = ("GiB", GIB) if end >= 4 * GIB else ("MiB", MIB)
    return tuple(
        Tick(at=100 * step * unit / end, text=f"{step:g} {name}")
        for step in (0, *_round_steps(end / unit, 5))
    )


def _rows(top: float) -> tuple[Tick, ...]:
    """Return labels of an axis of bytes that ends at `top`, which lies at 0 %."""
    return tuple(Tick(at=100 - tick.at, text=tick.text) for tick in byte_columns(top))


def _round_steps(end: float, most: int) -> list[float]:
    """Return at most so many round numbers up to an end, equally far apart.

    >>> _round_steps(43, 5)
    [10, 20, 30, 40]
    """
    rough = max(end / most, 1e-9)
    power = 1.0
    while power * 10 <= rough:
        power *= 10
    while power > rough:
        power /= 10
    step = next(power * times for times in (1, 2, 5, 10, 20) if power * times >= rough)
    step = max(step, 1)
    steps = [step * number for number in range(1, int(end / step) + 1)]
    return [int(each) if each == int(each) else each for each in steps]
