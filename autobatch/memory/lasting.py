"""What a training run holds from update to update, whatever its micro-batch is.

Invariant: no run with this state reserves less, because the allocator reserves what is allocated.
"""

from __future__ import annotations

from itertools import accumulate

from autobatch.memory.trace import Allocation, Trace

__all__ = ["lasting_bytes"]

_LASTING = ("parameters", "buffers", "gradients", "optimizer_state")

_COUNTER_BYTES = 8
"""An optimizer's counters of steps are on the card or on the host, depending on how it runs."""


def lasting_bytes(trace: Trace) -> int:
    """Return the most bytes of parameters, buffers, gradients and optimizer state alive at once.

    Counters of steps are left out.
    """
    sizes = [block.size_bytes if _lasts(block) else 0 for block in trace.blocks]
    return max(accumulate(sizes[e] if e >= 0 else -sizes[~e] for e in trace.events), default=0)


def _lasts(block: Allocation) -> bool:
    is_counter = block.category == "optimizer_state" and block.size_bytes <= _COUNTER_BYTES
    return block.category in _LASTING and not is_counter
