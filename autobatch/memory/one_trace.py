"""Whether a trace model that was made from one trace, at a prime micro-batch, may be right.

What the prime divides is taken to grow with the samples. That is a conjecture: here is when it is
worth an execution, which confirms it block by block or corrects it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from autobatch.memory.trace_model import PERMANENT, TraceModel

__all__ = ["is_plausible"]

_MOST_DOUBTFUL = 0.1
"""So many bytes for each that grows in proportion may seem to be constant, apart from parameters,
gradients and casts of them; of usual models it is less than 0.03."""


def is_plausible(model: TraceModel) -> bool:
    """Return whether sizes probably are what they seem.

    One that seems to be constant may grow with an offset, or in steps, or there may be one for each
    sample. Of those that a parameter has, too, or half as many bytes, none of that is likely.
    """
    if any(part.denominator > 1 for part in model.template.parts):  # rounded up
        return False
    usual = _usual_sizes(model)
    grows = doubtful = 0
    alike: Counter[Hashable] = Counter()
    for block, (_, slope, _) in zip(model.template.blocks, model.terms, strict=True):
        if slope:
            grows += block.size_bytes
        elif block.phase != "step" and block.size_bytes not in usual:
            doubtful += block.size_bytes
            alike[block, block.label] += 1
    is_for_each = any(times % model.nodes[0] == 0 for times in alike.values())
    return doubtful <= _MOST_DOUBTFUL * grows and not is_for_each


def _usual_sizes(model: TraceModel) -> set[int]:
    """Return the bytes of what is permanent, and of casts of it to half as many."""
    blocks = model.template.blocks
    sizes = {block.size_bytes for block in blocks if block.category in PERMANENT}
    return sizes | {size // 2 for size in sizes}
