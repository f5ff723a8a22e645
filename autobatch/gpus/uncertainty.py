"""How far a simulated peak may be from what a GPU measures, and what follows from it.

The errors are those of published tables of measured peaks (`reports/accuracy`, rows with at least
2 GiB in the allocator): what real runs reserved beyond the prediction. They hold what a simulation
does not know, such as the workspaces that cuDNN chooses, and how they fragment the cache. Most of
the rows are image models in fp32; how well they stand for others is not known.

The CUDA context is outside of the allocator and varies on its own, by driver and by the libraries
that a process loads.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping

__all__ = [
    "CONFIDENCE",
    "MEASURED_HEADROOM",
    "NEEDED",
    "SIMULATED_HEADROOM",
    "likelihood_of",
    "peak_range",
]

NEEDED: Mapping[int, float] = {
    1: -0.05,
    5: -0.027,
    10: -0.015,
    25: 0.0085,
    50: 0.027,
    75: 0.051,
    90: 0.0805,
    95: 0.10,
    99: 0.128,
}
"""Percentile of the runs: (reserved bytes as measured) / (as predicted) - 1."""

CONFIDENCE = 0.95
"""How likely a ceiling on a simulated GPU is to hold with the headroom that it is given."""

_LOW, _HIGH = 5, 95
"""Percentiles that a range lies between."""

_CONTEXTS = (0.5, 2.0)
"""A context against its typical size: from libraries that are loaded when first used (CUDA 11.7 and
later) to the full set of kernels, loaded at once."""


def peak_range(reserved_bytes: int, context_bytes: int) -> tuple[int, int]:
    """Return the least and the most that a run may hold on the device, nine times out of ten.

    >>> low, high = peak_range(10 * 2**30, 2**29)
    >>> round(low / 2**30, 1), round(high / 2**30, 1)
    (10.0, 12.0)
    """
    low, high = (
        round(reserved_bytes * (1 + NEEDED[percentile]) + share * context_bytes)
        for percentile, share in zip((_LOW, _HIGH), _CONTEXTS, strict=True)
    )
    return low, high


def likelihood_of(reserved_bytes: int, usable_bytes: int) -> float:
    """Return how likely a run that is predicted to reserve some bytes fits into the usable ones.

    Between 0.01 and 0.99, because nothing is known beyond the measured errors.

    >>> likelihood_of(100, 90), likelihood_of(100, 110) >= CONFIDENCE, likelihood_of(100, 200)
    (0.01, True, 0.99)
    """
    spare = usable_bytes / reserved_bytes - 1
    percentiles, shares = list(NEEDED), list(NEEDED.values())
    above = bisect_right(shares, spare)
    if above == 0 or above == len(shares):
        return percentiles[min(above, len(shares) - 1)] / 100
    low, high = shares[above - 1], shares[above]
    between = percentiles[above] - percentiles[above - 1]
    return (percentiles[above - 1] + between * (spare - low) / (high - low)) / 100


def _headroom(confidence: float) -> float:
    """Return the share of the usable memory to leave free, in whole percent, rounded up."""
    needed = NEEDED[round(100 * confidence)]
    return math.ceil(100 * needed / (1 + needed)) / 100


SIMULATED_HEADROOM = _headroom(CONFIDENCE)
"""The share that a tuner leaves free on a simulated GPU by default."""

MEASURED_HEADROOM = 0.05
"""The default where windows run on the GPU itself, and only later changes are unknown."""
