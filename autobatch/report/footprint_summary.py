"""What a report says about one footprint: every byte on the device at the peak."""

from __future__ import annotations

from collections.abc import Mapping

from autobatch.gpus.uncertainty import BASES
from autobatch.records.footprint import Footprint
from autobatch.report.document import Document, Facts, Section, Table, printable
from autobatch.support.units import format_bytes
from autobatch.support.wording import count

__all__ = ["account", "basis_of", "device_range", "footprint_summary", "share"]


def footprint_summary(footprint: Footprint, capacity_bytes: int | None) -> Document:
    """Return the account of one predicted footprint; the capacity where the GPU is known."""
    device = footprint.peak_device_bytes
    pairs = [
        (
            "allocator",
            f"{format_bytes(footprint.peak_allocated_bytes)} allocated, "
            f"{format_bytes(footprint.peak_reserved_bytes)} reserved at the peak",
        )
    ]
    if footprint.low_device_bytes is not None:
        pairs.append(("range", f"{device_range(footprint)} ({basis_of(footprint)})"))
    if capacity_bytes is not None:
        free = capacity_bytes - device
        verdict = f"{format_bytes(free)} free" if free >= 0 else f"{format_bytes(-free)} too much"
        pairs.append(
            (
                "capacity",
                f"{format_bytes(capacity_bytes)}, {share(device, capacity_bytes)} used: {verdict}",
            )
        )
    return Document(
        title=f"{format_bytes(device)} on the device at micro-batch {footprint.micro_batch:,}",
        subtitle=(
            f"{count(footprint.accumulation_steps, 'accumulation step')} on "
            f"{printable(footprint.gpu)}, {footprint.evidence}"
        ),
        sections=(
            Section("", (Facts(tuple(pairs)),)),
            account(footprint),
        ),
    )


def account(footprint: Footprint, most_bytes: Mapping[str, int] | None = None) -> Section:
    """List every byte on the device at the peak, with subtotals; shares are of the whole.

    Args:
        footprint: of the window.
        most_bytes: by category, the most that is alive at once in the window, at the peak or not:
            gradients, say, may be few at the peak, and many at another instant.
    """
    device = footprint.peak_device_bytes
    most = most_bytes or {}
    lines = [(name, size) for name, size in footprint.categories.items() if size or most.get(name)]
    totals = [len(lines), len(lines) + 2, len(lines) + 4]
    lines += [
        ("= peak allocated", footprint.peak_allocated_bytes),
        ("cached by the allocator", footprint.cached_bytes),
        ("= peak reserved", footprint.peak_reserved_bytes),
        ("CUDA context", footprint.context_bytes),
        ("= on the device", device),
    ]
    table = Table(
        columns=(
            *("category", "bytes", "size"),
            *(("most in the window",) if most else ()),
            "share",
        ),
        align="lrrrr" if most else "lrrr",
        rows=tuple(
            (
                *(name, f"{size:,}", format_bytes(size)),
                *((format_bytes(most[name]) if name in most else "",) if most else ()),
                share(size, device),
            )
            for name, size in lines
        ),
        totals=frozenset(totals),
    )
    return Section(f"Memory at the peak ({footprint.evidence})", (table,))


def basis_of(footprint: Footprint) -> str:
    """Say which evidence stands behind a footprint's range."""
    return BASES[footprint.kind or "convolutions"]


def device_range(footprint: Footprint) -> str:
    """Say how far the device's peak may be off; nothing where a GPU was measured."""
    low, high = footprint.low_device_bytes, footprint.high_device_bytes
    if low is None or high is None:
        return ""
    return f"{format_bytes(low)} to {format_bytes(high)} on the device in 9 of 10 runs"


def share(part_bytes: int, whole_bytes: int) -> str:
    """Render a part as a percentage of the whole."""
    return f"{part_bytes / whole_bytes:.1%}" if whole_bytes else "-"
