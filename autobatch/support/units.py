"""Bytes as people write them; integers everywhere else.

Invariant: binary units only (1 GiB = 2**30 bytes), as PyTorch and `nvidia-smi` count.
"""

from __future__ import annotations

import re

from autobatch.errors import UsageError

__all__ = ["GIB", "KIB", "MIB", "format_bytes", "format_seconds", "parse_bytes"]

KIB = 2**10
MIB = 2**20
GIB = 2**30

_SCALES = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": 2**40}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Parse "24GiB", "512 MiB", "1.5g" or "1024" into bytes; K, M, G and T are binary.

    Raises:
        UsageError: the text is not a positive size.

    >>> parse_bytes("24GiB")
    25769803776
    """
    match = _PATTERN.fullmatch(text)
    size = int(float(match[1]) * _SCALES[match[2].upper()]) if match else 0
    if size <= 0:
        raise UsageError(f"{text!r} is not a size in bytes: write it as 24GiB or 512MiB")
    return size


def format_bytes(size_bytes: int) -> str:
    """Render bytes with three significant figures in the largest fitting binary unit.

    >>> format_bytes(42_949_672_960), format_bytes(1536), format_bytes(-512)
    ('40.0 GiB', '1.50 KiB', '-512 B')
    """
    magnitude = abs(size_bytes)
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if magnitude >= scale:
            value = magnitude / scale
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{'-' if size_bytes < 0 else ''}{value:.{digits}f} {unit}"
    return f"{size_bytes} B"


def format_seconds(seconds: float) -> str:
    """Render a time with three significant digits.

    >>> [format_seconds(t) for t in (0.00012, 0.0345, 1.239, 75.4, 7322)]
    ['120 µs', '34.5 ms', '1.24 s', '75.4 s', '2.03 h']
    """
    if seconds >= 3600:
        return f"{seconds / 3600:.3g} h"
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} µs"
