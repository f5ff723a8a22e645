"""The document that tells what a recorded memory snapshot shows, device by device."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from autobatch.records.explanation import (
    DeviceExplanation,
    ExplanationRecord,
    LargeBlock,
    Place,
    Replay,
    Reserve,
)
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
from autobatch.report.explained_settings import name_of, other_settings, shortage_told
from autobatch.report.footprint_summary import share
from autobatch.support.units import format_bytes
from autobatch.support.wording import count

__all__ = ["chart_of", "explanation_summary", "is_drawn"]

_PLACES = _OPERATORS = 10

_BASES = {
    "stack": "stack",
    "stack and lifetime": "stack and lifetime",
    "lifetime": "lifetime",
    "annotation": "annotation",
    "profiler": "profiler",
    "nothing": "-",
}


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
        yield Section(f"{prefix}Out of memory", shortage_told(device.shortage, device.alternatives))
    account: list[ContentBlock] = [_account(device)]
    if is_drawn(device):
        caption = f"What was held over the recording on device {device.device}, and the reserve."
        account.insert(0, Chart(chart_of(device), caption))
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
        yield Section(f"{prefix}Other allocator settings (simulated)", other_settings(device))
    if device.notes:
        notes = tuple(map(printable, device.notes))
        yield Section(f"{prefix}Notes", (Bullets(notes),))


def is_drawn(device: DeviceExplanation) -> bool:
    """Whether there is a history, and something was reserved in it."""
    return device.history is not None and any(device.history.reserved_bytes)


def chart_of(device: DeviceExplanation) -> str:
    """Return the name of the drawing of a device's history."""
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
    pairs.append(("settings", name_of(device.settings)))
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
