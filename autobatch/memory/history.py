"""Memory over a recording: what was held at instants that keep every peak, by category.

Invariant: the instant at which most was allocated is one of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate

from autobatch.memory.holdings import Life
from autobatch.records.explanation import History

__all__ = ["history_of"]

_INSTANTS = 500
"""So many are kept at most: a chart is not wider."""


def history_of(
    lives: Iterable[tuple[Life, str]], allocated: Sequence[int], reserved: Sequence[int]
) -> History:
    """Return the history of a recording.

    Args:
        lives: the blocks, with the category of each.
        allocated: bytes in use after each event; of neighbouring events, the one with most counts.
        reserved: bytes in segments after each event.
    """
    step = -(-len(allocated) // _INSTANTS) or 1
    instants = [
        max(range(start, min(start + step, len(allocated))), key=allocated.__getitem__)
        for start in range(0, len(allocated), step)
    ]
    changes: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(instants) + 1))
    for life, category in lives:
        born = 0 if life.born is None else bisect_left(instants, life.born)
        freed = len(instants) if life.freed is None else bisect_left(instants, life.freed)
        changes[category][born] += life.requested_bytes
        changes[category][freed] -= life.requested_bytes
    held = {category: tuple(accumulate(each))[:-1] for category, each in changes.items()}
    return History(
        events=tuple(instants),
        held_bytes=tuple(sorted(held.items(), key=lambda pair: -max(pair[1], default=0))),
        reserved_bytes=tuple(reserved[instant] for instant in instants),
    )
