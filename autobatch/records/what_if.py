"""What a report needs to answer other questions about a plan without a simulation.

Invariant: a ceiling that is here is the one that `autobatch.tune` finds; a question whose ceiling
is not here has no answer here.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WhatIf", "WhatIfCard"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIfCard:
    """A card on which the plan's windows take the same memory.

    Attributes:
        name: in the catalogue.
        capacity_bytes, context_bytes: as of `GpuSpec`.
        headrooms: shares of the usable memory to leave free, ascending.
        ceilings: for each of them, the largest micro-batch that fits.
    """

    name: str
    capacity_bytes: int
    context_bytes: int
    headrooms: tuple[float, ...]
    ceilings: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """Peaks of the plan's windows by micro-batch, and the ceilings that follow on some cards.

    Attributes:
        micro_batches: ascending.
        peak_reserved_bytes: at each of them, of windows that accumulate.
        cards: the plan's own first, then others by capacity.
    """

    micro_batches: tuple[int, ...]
    peak_reserved_bytes: tuple[int, ...]
    cards: tuple[WhatIfCard, ...]
