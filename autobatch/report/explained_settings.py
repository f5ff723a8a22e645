"""What a recorded run would have reserved under other allocator settings, in words and tables."""

from __future__ import annotations

from collections.abc import Sequence

from autobatch.records.explanation import Alternative, DeviceExplanation, Shortage
from autobatch.report.document import ContentBlock, Facts, Paragraph, Table, printable
from autobatch.support.units import format_bytes
from autobatch.support.wording import count

__all__ = ["name_of", "other_settings", "shortage_told"]

_WORTH_SAYING = 0.01  # of the reserve
_LONG = 32
"""Characters of settings that a table has room for."""


def shortage_told(shortage: Shortage, rows: Sequence[Alternative]) -> tuple[ContentBlock, ...]:
    """Return what is known of a request that failed, and which of the tried settings would do."""
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


def other_settings(device: DeviceExplanation) -> tuple[ContentBlock, ...]:
    """Return what the run would have reserved under each of the tried settings, and the best."""
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
            if _cell_of(each.settings) != name_of(each.settings)
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


def name_of(settings: str) -> str:
    """Return what settings are called where they are read."""
    return printable(settings) or "PyTorch's defaults"


def _cell_of(settings: str) -> str:
    """Name settings in a table: of long ones the beginning and the end, which tell them apart."""
    name = name_of(settings)
    half = _LONG // 2
    return name if len(name) <= _LONG else f"{name[:half]}…{name[1 - half :]}"


def _quoted(settings: str) -> str:
    """Name settings in a sentence: as they are typed, where there is something to type."""
    return f"`{printable(settings)}`" if settings else name_of(settings)


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
