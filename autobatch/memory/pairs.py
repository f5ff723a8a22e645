"""Tensors with a number for each two samples of a micro-batch, as contrastive losses make them.

They may take so few bytes that no memory shows them; their shapes do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autobatch.memory.trace import Trace

__all__ = ["paired", "pairs_samples"]

_ACCIDENTAL = 3
"""Of larger micro-batches, a dimension is a multiple hardly by accident."""


def paired(traces: Mapping[int, Trace]) -> tuple[int, ...] | None:
    """Return the shape of a tensor that has the samples in two of its dimensions, if there is one.

    Args:
        traces: of windows with as many micro-batches each, by micro-batch; the two smallest are
            compared, block by block where they are alike. Labels tell the shapes. Returned is that
            of the smallest.
    """
    if len(traces) < 2:
        return None
    small, large = sorted(traces)[:2]
    some, more = traces[small].blocks, traces[large].blocks
    if len(some) == len(more):
        for one, other in zip(some, more, strict=True):
            if one.label.shape != other.label.shape:
                sizes = zip(one.label.shape, other.label.shape, strict=False)
                if sum(a != b and a * large == b * small for a, b in sizes) > 1:
                    return one.label.shape
    # a kernel may take another way, in which there is such a tensor as well
    there = {block.label.shape for block in more}
    for shape in {block.label.shape: None for block in some if small > _ACCIDENTAL}:
        if pairs_samples(shape, small) and _scaled(shape, small, large) in there:
            return shape
    return None


def _scaled(shape: Sequence[int], small: int, large: int) -> tuple[int, ...]:
    return tuple(dim * large // small if dim % small == 0 else dim for dim in shape)


def pairs_samples(shape: Sequence[int], micro_batch: int) -> bool:
    """Return whether two dimensions are the same multiple of the micro-batch, the first one too.

    >>> pairs_samples((22, 22), 11), pairs_samples((11, 48, 77, 77), 11)
    (True, False)
    """
    multiples = [dim for dim in shape if dim and dim % micro_batch == 0]
    return multiples.count(multiples[0]) > 1 if multiples else False
