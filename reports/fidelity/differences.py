"""Kinds of differences between a trace of the bench and a predicted one."""

from __future__ import annotations

from collections import Counter

from autobatch.memory.trace import Trace
from reports.hardware.alignment import align


def show(real: Trace, virtual: Trace, most: int = 14) -> None:
    aligned = align(real, virtual)
    for side, trace, blocks in (
        ("only real", real, aligned.only_real),
        ("only predicted", virtual, aligned.only_virtual),
    ):
        at_peak = set(trace.live_at(trace.peak_event()))
        count = Counter(
            (trace.blocks[b].op, trace.blocks[b].phase, trace.blocks[b].size_bytes) for b in blocks
        )
        peak = Counter(
            (trace.blocks[b].op, trace.blocks[b].phase, trace.blocks[b].size_bytes)
            for b in blocks
            if b in at_peak
        )
        for key, n in sorted(count.items(), key=lambda i: -i[0][2] * i[1])[:most]:
            print(
                f"      {side:15} {key[0]:45} {key[1]:9} {n:4} x {key[2]:>12,} B, at peak {peak[key]}"
            )


def sequence(real: Trace, virtual: Trace, most: int = 60, context: int = 2) -> None:
    """Print both traces side by side in order, where they differ."""
    pairs = sorted(align(real, virtual).pairs)
    lines = []
    i = j = 0
    n_real, n_virtual = len(real.blocks), len(virtual.blocks)
    for a, b in [*pairs, (n_real, n_virtual)]:
        while i < a:
            x = real.blocks[i]
            lines.append((False, f"R {x.phase:8} {x.size_bytes:>13,} {x.op}"))
            i += 1
        while j < b:
            x = virtual.blocks[j]
            lines.append((False, f"  V {x.phase:8} {x.size_bytes:>13,} {x.op}"))
            j += 1
        if a < n_real:
            x, y = real.blocks[a], virtual.blocks[b]
            lines.append((True, f"=   {x.phase:8} {x.size_bytes:>13,} {x.op} | {y.op}"))
        i, j = a + 1, b + 1
    shown = 0
    keep = [
        any(not lines[k][0] for k in range(max(0, n - context), min(len(lines), n + context + 1)))
        for n in range(len(lines))
    ]
    last = -1
    for n, (same, text) in enumerate(lines):
        if keep[n]:
            if n != last + 1:
                print("      ...")
            print("     ", text)
            last = n
            shown += 1
            if shown > most:
                break
