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
            one whose forward ran (also a checkpoint's second one), or whose backward ran; of a
            parameter, its gradient and its optimizer state, the first module that owns the
            parameter. The model is the one below a `torch.compile`, DataParallel and
            DistributedDataParallel of the whole, and as it was before levers wrapped parts of it.
            Empty for the model itself and for what no module made: inputs, what a loss function
            computes, temporaries of a step, buckets of gradients, workspaces that libraries keep. A
            module outside of the model is its class in parentheses, with the path below it:
            `(Teacher).layers.0`, `(CrossEntropyLoss)`.
        op: the operator that allocated it, as "mm", with its namespace where that is not PyTorch's
            own; for scratch what it is for, as "cublas workspace". Empty where it is not known.
        category: as in `Footprint.categories`.
        phase: of the window in which it was allocated.
        shape: of the first tensor in this memory; empty for a scalar, and where `dtype` is.
        dtype: of that tensor, as "float32"; empty for scratch of a kernel, which no tensor shows,
            for blocks that take another shape by micro-batch, and on a GPU that is measured for
            what no operator took as it was made.
        where: the innermost line of the user's code, as "run/train.py:12 loss"; empty in backward
            passes and steps, where only libraries run.
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
