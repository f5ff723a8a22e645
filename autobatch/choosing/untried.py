"""The order in which what a sampler did not propose is looked at: like the fastest so far, first.

Invariant: every combination of settings comes exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product

__all__ = ["by_distance"]


def by_distance(
    settings: Mapping[str, Sequence[str]], center: Mapping[str, str]
) -> Iterator[dict[str, str]]:
    """Yield combinations of settings: those first that differ in fewest from one of them.

    Args:
        settings: of each lever, by its name.
        center: one of each.

    >>> center = {"precision": "bf16", "checkpointing": "as it is"}
    >>> settings = {"precision": ["as it is", "bf16"], "checkpointing": ["as it is", "all"]}
    >>> for each in by_distance(settings, center):
    ...     print(*each.values())
    bf16 as it is
    as it is as it is
    bf16 all
    as it is all
    """
    others = {name: [v for v in values if v != center[name]] for name, values in settings.items()}
    for distance in range(len(settings) + 1):
        for names in combinations(settings, distance):
            for values in product(*(others[name] for name in names)):
                yield {**center, **dict(zip(names, values, strict=True))}
