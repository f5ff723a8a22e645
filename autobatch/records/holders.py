"""Which layer, operator and tensor holds memory: at the peak, and over the traced windows.

Invariant: blocks at the peak sum, category by category, to the footprint's figures without
rounding; lives and what is left out of them sum to the timeline's categories at every sample.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Holder", "Lives", "PeakBlocks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """What a block of memory is, apart from its bytes and its life.

    Attributes:
        module: name in `model.named_modules()` of the innermost module that made the tensor: the
            one whose forward ran, the one whose backward ran, or the one that owns the parameter
            which this is a gradient or optimizer state of. Empty for the model itself and for
            what no module made, such as inputs and the loss.
        op: the operator that allocated it, as "mm"; empty where that is not known.
        category: as in `Footprint.categories`.
        phase: of the window in which it was allocated.
        shape: of the first tensor in this memory; empty for a scalar, and where `dtype` is.
        dtype: of that tensor, as "float32"; empty for scratch of a kernel, which no tensor shows.
        where: the line of the user's code that ran, as "train.py:12 loss"; empty in the backward
            pass, in libraries, and where it is not known.
    """

    module: str
    op: str
    category: str
    phase: str
    shape: tuple[int, ...]
    dtype: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakBlocks:
    """Blocks with the same holder that are alive when most bytes are allocated.

    Attributes:
        holder: what they are.
        count: how many there are.
        size_bytes: of all of them together, as requested, without rounding.
    """

    holder: Holder
    count: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lives:
    """The largest blocks of the traced windows, each with its life; column by column.

    Attributes:
        holders: each once.
        holder: of each block, the index of its holder.
        start: of each block, the event that allocated it, in ascending order.
        end: of each block, the event that freed it; the number of events where none did.
        size_bytes: of each block, as requested.
        least_bytes: blocks smaller than this are left out; 0 where all are here.
        events: how many there were.
    """

    holders: tuple[Holder, ...]
    holder: tuple[int, ...]
    start: tuple[int, ...]
    end: tuple[int, ...]
    size_bytes: tuple[int, ...]
    least_bytes: int
    events: int
