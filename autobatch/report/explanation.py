"""What a recorded memory snapshot shows, as users hold and read it.

Invariant: what was recorded is called measured, and what other settings would do, simulated.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from autobatch.memory.explanation import explain_snapshot, load_for_explanation
from autobatch.records.codec import dump_json, encode
from autobatch.records.explanation import (
    Alternative,
    DeviceExplanation,
    ExplanationRecord,
    LargeBlock,
    Place,
    Replay,
    Reserve,
    Shortage,
)
from autobatch.report import text
from autobatch.report.document import (
    Bullets,
    Chart,
    ContentBlock,
    Document,
    Facts,
    Paragraph,
    Section,
    Table,
    printable,
)
from autobatch.report.footprint_summary import share
from autobatch.report.own_files import report_folder
from autobatch.support.files import write_text
from autobatch.support.units import format_bytes
from autobatch.support.wording import count

__all__ = ["SCHEMA_VERSION", "Explanation", "explain", "explanation_summary"]

SCHEMA_VERSION = 1

_PLACES = _OPERATORS = 10
_WORTH_SAYING = 0.01  # of the reserve
_LONG = 32
"""Characters of settings that a table has room for."""

_BASES = {
    "stack": "stack",
    "stack and lifetime": "stack and lifetime",
    "lifetime": "lifetime",
    "annotation": "annotation",
    "profiler": "profiler",
    "nothing": "-",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation(ExplanationRecord):
    """What a memory snapshot shows, by device; `print` shows all of it.

    Attributes:
        source: the file, as it was named.
        devices: those of which the snapshot shows anything.
    """

    def to_json(self) -> str:
        """Render the explanation as JSON text; sizes are in bytes, and events count from 0."""
        return dump_json({"schema_version": SCHEMA_VERSION} | encode(self))

    def report(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.html, report.md, explanation.json and charts into a folder.

        Returns:
            The path of report.html, which opens from disk.

        Raises:
            FileError: the folder or a file in it cannot be written.
        """
        from autobatch.report import html, markdown

        document = explanation_summary(self)
        recorded = [device for device in self.devices if _is_drawn(device)]
        with report_folder("explanation", folder, has_charts=bool(recorded)) as (target, charts):
            write_text(target / "explanation.json", self.to_json())
            drawings = _write_charts(recorded, charts)
            write_text(target / "report.md", markdown.render(document))
            return write_text(target / "report.html", html.page(document, drawings))

    def __repr__(self) -> str:
        """Name what is shown; `print(explanation)` shows the whole."""
        peaks = ", ".join(
            f"device {each.device} reserved {format_bytes(each.peak_reserved_bytes)}"
            for each in self.devices
        )
        return f"<Explanation of {self.source}: {peaks or 'no device'}>"

    def __str__(self) -> str:
        """Render the explanation as plain text."""
        return text.render(explanation_summary(self))


def explain(
    path: str | Path, *, device: int | None = None, settings: Sequence[str] = (), top: int = 10
) -> Explanation:
    """Say what held the memory of a recorded PyTorch memory snapshot, and what else would do.

    The snapshot is what `torch.cuda.memory._dump_snapshot(path)` writes after
    `torch.cuda.memory._record_memory_history()`. Nothing in the file is run. What was recorded is
    measured; under other allocator settings the recorded requests are simulated.

    Args:
        path: of the snapshot.
        device: index of the only device to explain; all that the snapshot shows if None.
        settings: texts of PYTORCH_CUDA_ALLOC_CONF to try, beside the usual ones, such as
            `["max_split_size_mb:256", "roundup_power2_divisions:8"]`.
        top: how many of the largest blocks to name; those alike count once.

    Raises:
        FileError: the file cannot be read, or is no snapshot of data alone.
        UsageError: the snapshot shows nothing of the device, or PyTorch would refuse a setting.

    Example:
        >>> print(explain("snapshot.pickle"))  # doctest: +SKIP
    """
    if isinstance(settings, str):
        settings = [settings]
    record = explain_snapshot(
        load_for_explanation(path), str(path), device=device, settings=settings, top=top
    )
    return Explanation(**{each.name: getattr(record, each.name) for each in fields(record)})


def explanation_summary(explanation: ExplanationRecord) -> Document:
    """Return the document of an explanation, device by device."""
    devices = explanation.devices
    most = max(devices, key=lambda each: each.reserve.allocated_bytes)
    moment = "at the peak" if most.moment == "peak" else "in the final state"
    where = f" on device {most.device}" if len(devices) > 1 else ""
    return Document(
        title=(
            f"{format_bytes(most.reserve.allocated_bytes)} allocated {moment}{where}, "
            f"{format_bytes(most.reserve.reserved_bytes)} reserved"
        ),
        subtitle=(
            (f"device {devices[0].device}" if len(devices) == 1 else f"{len(devices)} devices")
            + ", measured by PyTorch's allocator"
        ),
        sections=tuple(
            section
            for each in devices
            for section in _sections(
                each, explanation.source, f"Device {each.device}: " if len(devices) > 1 else ""
            )
        ),
    )


def _sections(device: DeviceExplanation, source: str, prefix: str) -> Iterator[Section]:
    moment = "peak" if device.moment == "peak" else "final state"
    yield Section(prefix.rstrip(": "), (_facts(device, source),))
    if device.shortage:
        yield Section(f"{prefix}Out of memory", _shortage(device.shortage, device.alternatives))
    account: list[ContentBlock] = [_account(device)]
    if _is_drawn(device):
        caption = f"What was held over the recording on device {device.device}, and the reserve."
        account.insert(0, Chart(_chart_of(device), caption))
    yield Section(f"{prefix}What held the {moment} (measured)", tuple(account))
    if device.places:
        yield Section(f"{prefix}By line of code", (_places(device),))
        if any(place.operator for place in device.places):
            yield Section(f"{prefix}By operator", (_operators(device),))
        yield Section(f"{prefix}Largest blocks", (_largest(device.largest),))
    yield Section(
        f"{prefix}Reserved, but not allocated (measured)",
        _unused(device.reserve, "at the peak" if device.moment == "peak" else "in the final state"),
    )
    if device.alternatives:
        yield Section(f"{prefix}Other allocator settings (simulated)", _alternatives(device))
    if device.notes:
        notes = tuple(map(printable, device.notes))
        yield Section(f"{prefix}Notes", (Bullets(notes),))


def _write_charts(recorded: Sequence[DeviceExplanation], charts: Path) -> dict[str, str]:
    """Draw what each device with a history held over time; return the drawings by name."""
    if not recorded:
        return {}
    from autobatch.report.charts.frame import save, style
    from autobatch.report.charts.history import draw_history

    with style():
        return {
            _chart_of(device): save(draw_history(device), charts, _chart_of(device))
            for device in recorded
        }


def _is_drawn(device: DeviceExplanation) -> bool:
    """Whether there is a history, and something was reserved in it."""
    return device.history is not None and any(device.history.reserved_bytes)


def _chart_of(device: DeviceExplanation) -> str:
    return f"history-{device.device}"


def _facts(device: DeviceExplanation, source: str) -> Facts:
    reserve = device.reserve
    allocated = format_bytes(reserve.allocated_bytes)
    if device.moment == "end":
        pairs = [("final state", f"{allocated} allocated; there are no events to replay")]
    elif device.moment_event is None:
        pairs = [
            (
                "peak",
                f"{allocated} allocated, before the first of "
                f"{count(device.events, 'recorded event')}",
            )
        ]
    else:
        asked = f", for {printable(device.moment_where)}" if device.moment_where else ""
        pairs = [
            (
                "peak",
                f"{allocated} allocated, after {device.moment_event + 1:,} of "
                f"{count(device.events, 'recorded event')}{asked}",
            )
        ]
    pairs.insert(0, ("snapshot", printable(source)))
    reserved = f"{format_bytes(reserve.reserved_bytes)} then"
    if device.peak_reserved_bytes != reserve.reserved_bytes:
        reserved += f", {format_bytes(device.peak_reserved_bytes)} at most"
    pairs.append(("reserved", reserved))
    pairs.append(("settings", _name_of(device.settings)))
    if device.alloc_retries:
        pairs.append(
            (
                "cache released",
                f"{count(device.alloc_retries, 'time')}, to make room for a request: that stalls "
                "the GPU",
            )
        )
    if device.replay:
        pairs.append(("replay", _replay(device.replay)))
    return Facts(tuple(pairs))


def _replay(replay: Replay) -> str:
    reserved = format_bytes(replay.recorded_reserved_bytes)
    ties = (
        f" ({count(replay.ties, 'choice')} between free blocks of one size as recorded)"
        if replay.ties
        else ""
    )
    if replay.exact:
        made = {0: "has no allocation to make", 1: "makes the one allocation as recorded"}.get(
            replay.requests, f"makes all {replay.requests:,} allocations as recorded"
        )
        return (
            f"the simulated allocator {made} and reserves the same "
            f"{replay.recorded_reserved_bytes:,} bytes" + ties
        )
    difference = replay.replayed_reserved_bytes - replay.recorded_reserved_bytes
    parts = [
        f"the simulated allocator makes {replay.requests_matched:,} of "
        f"{count(replay.requests, 'allocation')} as recorded"
    ]
    if difference:
        sign = "more" if difference > 0 else "less"
        parts.append(f"and reserves {format_bytes(abs(difference))} {sign} than {reserved}")
    else:
        parts.append(f"and reserves the same {reserved}")
    because = f": {printable(replay.first_difference)}" if replay.first_difference else ""
    return " ".join(parts) + ties + because


def _account(device: DeviceExplanation) -> Table:
    reserve = device.reserve
    total = reserve.allocated_bytes
    rows = [
        (
            printable(held.category),
            _BASES[held.basis],
            f"{held.blocks:,}",
            f"{held.size_bytes:,}",
            format_bytes(held.size_bytes),
            share(held.size_bytes, total),
        )
        for held in device.held
    ]
    if reserve.rounding_bytes:
        rows.append(_sum_row("rounding by the allocator", reserve.rounding_bytes, total))
    name = "= peak allocated" if device.moment == "peak" else "= allocated"
    rows.append(_sum_row(name, total, total))
    return Table(
        columns=("category", "known by", "blocks", "bytes", "size", "share"),
        align="llrrrr",
        rows=tuple(rows),
        totals=frozenset({len(rows) - 1}),
    )


def _sum_row(name: str, size: int, total: int) -> tuple[str, str, str, str, str, str]:
    return (name, "", "", f"{size:,}", format_bytes(size), share(size, total))


def _places(device: DeviceExplanation) -> Table:
    total = device.reserve.allocated_bytes
    merged: defaultdict[tuple[str, str], list[Place]] = defaultdict(list)
    for place in device.places:
        merged[_line(place), _operator(place)].append(place)
    sums = sorted(
        (
            (sum(each.size_bytes for each in places), sum(each.blocks for each in places), key)
            for key, places in merged.items()
        ),
        key=lambda row: -row[0],
    )
    rows = [
        (format_bytes(size), share(size, total), f"{blocks:,}", line, operator)
        for size, blocks, (line, operator) in sums[:_PLACES]
    ]
    if rest := sums[_PLACES:]:
        size = sum(row[0] for row in rest)
        blocks = sum(row[1] for row in rest)
        name = count(len(rest), "more place")
        rows.append((format_bytes(size), share(size, total), f"{blocks:,}", name, ""))
    return Table(("size", "share", "blocks", "line", "operator"), "rrrll", tuple(rows))


def _operators(device: DeviceExplanation) -> Table:
    """List what each operator held, whatever the line; the rows sum to what was allocated."""
    sizes: Counter[str] = Counter()
    blocks: Counter[str] = Counter()
    for place in device.places:
        sizes[place.operator] += place.size_bytes
        blocks[place.operator] += place.blocks
    total = device.reserve.allocated_bytes
    largest = sizes.most_common()
    lines = [
        (printable(name) or "not known", blocks[name], size) for name, size in largest[:_OPERATORS]
    ]
    if rest := largest[_OPERATORS:]:
        number = sum(blocks[name] for name, _ in rest)
        lines.append((count(len(rest), "more operator"), number, sum(size for _, size in rest)))
    if device.reserve.rounding_bytes:
        lines.append(("rounding by the allocator", 0, device.reserve.rounding_bytes))
    lines.append(("= peak allocated" if device.moment == "peak" else "= allocated", 0, total))
    rows = tuple(
        (name, f"{number:,}" if number else "", format_bytes(size), share(size, total))
        for name, number, size in lines
    )
    return Table(
        ("operator", "blocks", "size", "share"), "lrrr", rows, totals=frozenset({len(rows) - 1})
    )


def _line(place: Place | LargeBlock) -> str:
    label = f" [{printable(place.label)}]" if place.label else ""
    if place.where:
        return printable(place.where) + label
    # The backward pass of PyTorch runs in a thread of its own, which no line of Python started.
    missing = "no line of Python" if place.operator else printable(place.category)
    return missing + label


def _operator(place: Place | LargeBlock) -> str:
    return printable(place.operator) or "-"


def _largest(blocks: Sequence[LargeBlock]) -> Table:
    """List the largest blocks; those alike are one row, with the age of the oldest."""
    rows = tuple(
        (
            format_bytes(block.requested_bytes),
            f"{block.blocks:,}",
            "older" if block.age_events is None else count(block.age_events, "event"),
            printable(block.category),
            _line(block) if block.where or block.label else "-",
            _operator(block),
        )
        for block in blocks
    )
    return Table(("size", "blocks", "age", "category", "line", "operator"), "rrrlll", rows)


def _unused(reserve: Reserve, moment: str) -> tuple[ContentBlock, ...]:
    total = reserve.reserved_bytes
    lines = [
        ("free blocks between blocks in use (fragmentation)", reserve.split_bytes),
        ("free segments, which can be given back", reserve.whole_bytes),
        ("free, held for CUDA graphs or a torch.cuda.MemPool", reserve.private_bytes),
        ("freed, but awaited by another stream", reserve.awaiting_bytes),
    ]
    rows = [
        (name, f"{size:,}", format_bytes(size), share(size, total)) for name, size in lines if size
    ]
    unused = reserve.unused_bytes
    rows.append(
        ("= reserved, not allocated", f"{unused:,}", format_bytes(unused), share(unused, total))
    )
    table = Table(
        (moment, "bytes", "size", "of reserved"),
        "lrrr",
        tuple(rows),
        totals=frozenset({len(rows) - 1}),
    )
    if not reserve.free_blocks:
        return (table,)
    largest = format_bytes(reserve.largest_free_bytes)
    if reserve.largest_free_bytes == unused:
        return (table, Paragraph(f"All of it is one free block of {largest}."))
    blocks = (
        "The only free block"
        if reserve.free_blocks == 1
        else f"The largest of {reserve.free_blocks:,} free blocks"
    )
    if reserve.private_bytes:
        blocks += " that any request may use"
    return (table, Paragraph(f"{blocks} has {largest}: a larger request needs new memory."))


def _alternatives(device: DeviceExplanation) -> tuple[ContentBlock, ...]:
    rows = device.alternatives
    base = rows[0]
    failed = base.meets_failed_request is not None
    columns = ["settings", "peak reserved", "difference", "peak allocated", "retries"]
    if failed:
        columns.append("the failed request")
    table = Table(
        columns=tuple(columns),
        align="l" + "r" * 4 + "l" * failed,
        rows=tuple(_row(each, base, failed) for each in rows),
    )
    return (
        table,
        Paragraph(_how_simulated(device)),
        *((Paragraph(found),) if (found := _best(rows)) else ()),
        *(
            Paragraph(f"{_cell_of(each.settings)} stands for `{printable(each.settings)}`.")
            for each in rows
            if _cell_of(each.settings) != _name_of(each.settings)
        ),
        *(
            Paragraph(f"{_quoted(each.settings)}: {printable(each.note)}.")
            for each in rows
            if each.note
        ),
    )


def _row(each: Alternative, base: Alternative, failed: bool) -> tuple[str, ...]:
    change = "-" if each is base else _change(each.peak_reserved_bytes, base.peak_reserved_bytes)
    cells = (
        _cell_of(each.settings) + (" (recorded)" if each.recorded else ""),
        "does not fit" if each.failed else format_bytes(each.peak_reserved_bytes),
        "-" if each.failed else change,
        format_bytes(each.peak_allocated_bytes),
        f"{each.alloc_retries:,}",
    )
    return (*cells, "is met" if each.meets_failed_request else "fails") if failed else cells


def _change(size: int, base: int) -> str:
    """Render a difference as a share of the base, where that holds anything."""
    if not base:
        return "-" if size else "0.0%"
    share_of_base = f"{(size - base) / base:+.1%}"
    is_small = share_of_base in ("+0.0%", "-0.0%")  # no sign tells of less than is shown
    return "0.0%" if is_small else share_of_base


def _name_of(settings: str) -> str:
    return printable(settings) or "PyTorch's defaults"


def _cell_of(settings: str) -> str:
    """Name settings in a table: of long ones the beginning and the end, which tell them apart."""
    name = _name_of(settings)
    half = _LONG // 2
    return name if len(name) <= _LONG else f"{name[:half]}…{name[1 - half :]}"


def _quoted(settings: str) -> str:
    """Name settings in a sentence: as they are typed, where there is something to type."""
    return f"`{printable(settings)}`" if settings else _name_of(settings)


def _how_simulated(device: DeviceExplanation) -> str:
    base = device.alternatives[0].peak_reserved_bytes
    recorded = device.peak_reserved_bytes
    if device.starts_empty and base == recorded:
        return "The recording begins with empty memory, so the first row is what was recorded."
    begins = (
        "The recording begins with empty memory"
        if device.starts_empty
        else "The recording begins when other blocks are alive, which are placed anew, in the "
        "order of their addresses, in an empty cache"
    )
    difference = recorded - base
    told = (
        "that makes what was recorded"
        if not difference
        else f"the recorded {format_bytes(recorded)} are {format_bytes(abs(difference))} "
        + ("more" if difference > 0 else "less")
        + " than the first row, because of what ran before"
        if not device.starts_empty
        else f"the recorded {format_bytes(recorded)} differ by {format_bytes(abs(difference))}"
    )
    return f"{begins}: {told}. Compare the rows with one another."


def _best(rows: Sequence[Alternative]) -> str:
    base = rows[0]
    usable = [each for each in rows[1:] if not each.failed]
    if base.meets_failed_request is not None:
        usable = [each for each in usable if each.meets_failed_request]
    if not usable:
        return ""
    best = min(usable, key=lambda each: each.peak_reserved_bytes)
    saved = base.peak_reserved_bytes - best.peak_reserved_bytes
    if not saved or saved < _WORTH_SAYING * base.peak_reserved_bytes:
        if base.meets_failed_request is False:
            return ""
        return f"No setting tried here saves more than {_WORTH_SAYING:.0%} of the reserve."
    how = (
        f"`PYTORCH_CUDA_ALLOC_CONF={printable(best.settings)}` would"
        if best.settings
        else "PyTorch's defaults, with PYTORCH_CUDA_ALLOC_CONF unset, would"
    )
    return f"{how} reserve {format_bytes(saved)} less."


def _shortage(shortage: Shortage, rows: Sequence[Alternative]) -> tuple[ContentBlock, ...]:
    reserve = shortage.reserve
    asked = ", ".join(filter(None, (shortage.where, shortage.operator)))
    pairs = [
        (
            "asked for",
            f"{format_bytes(shortage.requested_bytes)} ({shortage.requested_bytes:,} bytes)"
            + (f", for {printable(asked)}" if asked else ""),
        ),
        ("allocated", f"{format_bytes(reserve.allocated_bytes)} then"),
        (
            "cached",
            f"{format_bytes(reserve.split_bytes + reserve.whole_bytes)} free in "
            f"{count(reserve.free_blocks, 'block')} of {format_bytes(reserve.reserved_bytes)} "
            f"reserved, the largest of {format_bytes(reserve.largest_free_bytes)}",
        ),
        (
            "on the GPU",
            "not recorded; taken to have no more than the process once reserved"
            if shortage.device_free_bytes is None
            else f"{format_bytes(shortage.device_free_bytes)} free, by CUDA",
        ),
    ]
    if shortage.limited_by_process:
        pairs.append(
            (
                "limit",
                "CUDA had enough: the process had set itself a limit of at most "
                f"{format_bytes(shortage.limit_bytes)}",
            )
        )
    if shortage.events_after:
        pairs.append(("afterwards", f"{count(shortage.events_after, 'event')} followed"))
    return (Facts(tuple(pairs)), Paragraph(_what_would_help(shortage, rows)))


def _what_would_help(shortage: Shortage, rows: Sequence[Alternative]) -> str:
    limit = f"Within the {format_bytes(shortage.limit_bytes)} that could be reserved then"
    base, *others = rows
    helping = [each for each in others if each.meets_failed_request]
    names = ", ".join(_quoted(each.settings) for each in helping)
    if base.meets_failed_request:
        return (
            f"{limit}, the recorded settings would have met it, too, from an empty cache "
            "(simulated): what ran before the recording left the cache in pieces."
            + (f" So would {names}." if names else "")
        )
    if helping:
        return (
            f"{limit}, it would have been met with {names} (simulated). Requests that come after "
            "it are not recorded."
        )
    less = (
        "less has to be alive at once, see what held the peak"
        if shortage.reserve.allocated_bytes
        else "nothing was allocated then, so the request itself is too large"
    )
    return f"{limit}, no setting tried here meets it (simulated): {less}."
