"""Tensors with a number for each two samples of a micro-batch, as contrastive losses make them.

They may take so few bytes that no memory shows them; their shapes do.
"""

from __future__ import annotations

from collections.abc import Mapping

from autobatch.memory.trace import Trace

__all__ = ["paired"]


def paired(traces: Mapping[int, Trace]) -> tuple[int, ...] | None:
    """Return the shape of a tensor that has the samples in two of its dimensions, if there is one.

    Args:
        traces: of windows with as many micro-batches each, by micro-batch; the two smallest are
            compared, block by block. Labels tell the shapes.
    """
    if len(traces) < 2:
        return None
    small, large = sorted(traces)[:2]
    some, more = traces[small].blocks, traces[large].blocks
    if len(some) != len(more):
        return None
    for one, other in zip(some, more, strict=True):
        if one.label.shape != other.label.shape:
            sizes = zip(one.label.shape, other.label.shape, strict=False)
            if sum(a != b and a * large == b * small for a, b in sizes) > 1:
                return other.label.shape
    return None
