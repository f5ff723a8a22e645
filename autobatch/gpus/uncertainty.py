"""How far a simulated peak may be from what a GPU measures, and what follows from it.

The errors are those of published tables of measured peaks (`reports/accuracy`): what real runs
took beyond the prediction. There are two kinds of models. With convolutions, cuDNN chooses
workspaces that a simulation does not know, and they fragment the cache: the errors are those of
image models on an A100, rows with at least 2 GiB in the allocator. Without, kernels are products,
attention and elementwise ones, whose memory is known from PyTorch's source: the errors are those
of training steps of language models, allocated or reserved as they were counted. How well the rows
stand for others is not known, so the default headroom is that of convolutions for both.

The CUDA context is outside of the allocator and varies on its own, by driver and by the libraries
that a process loads. What each library adds was read on an H200 (`reports/hardware`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal

__all__ = [
    "BASES",
    "CONTEXTS",
    "CONTEXT_READINGS",
    "HIGH",
    "LOW",
    "MEASURED_HEADROOM",
    "NEEDED",
    "SIMULATED_HEADROOM",
    "Kind",
    "kind_of",
    "likelihood_of",
    "nccl_bytes",
    "peak_range",
]

Kind = Literal["convolutions", "products"]
"""What the kernels of a model are: with convolutions among them, or without."""

NEEDED: Mapping[Kind, Mapping[int, float]] = MappingProxyType(
    {
        "convolutions": {
            1: -0.0703,
            5: -0.0301,
            10: -0.0177,
            25: 0.0046,
            50: 0.0235,
            75: 0.0463,
            90: 0.0731,
            95: 0.0888,
            99: 0.1129,
        },
        "products": {
            1: -0.1418,
            5: -0.0947,
            10: -0.0112,
            25: -0.0017,
            50: 0.0,
            75: 0.0002,
            90: 0.0025,
            95: 0.0082,
            99: 0.0244,
        },
    }
)
"""By kind and percentile of the runs: bytes as measured / as predicted - 1."""

BASES: Mapping[Kind, str] = MappingProxyType(
    {
        "convolutions": "errors of 159 published peaks of image models",
        "products": "errors of 115 published peaks of language models' steps",
    }
)
"""What stands behind the figures of each kind, in words."""

CONTEXT_READINGS: Mapping[str, int] = MappingProxyType(
    {
        "context": 552_402_944,
        "elementwise kernels": 96_468_992,
        "cuBLAS": 69_206_016,
        "attention": 85_983_232,
        "fft": 8_388_608,
        "cuSOLVER": 100_663_296,
        "CUDA graphs": 73_400_320,
        "NCCL, one rank": 511_705_088,
    }
)
"""Bytes outside of the allocator that each part added in one process on an H200, loaded lazily.

Reductions, sorting, layer norms, optimizers, convolutions after attention, sparse products and
Triton added nothing.
"""

LOW, HIGH = 5, 95
"""Percentiles that a range lies between."""

CONTEXTS = (0.5, 2.0)
"""A context against its typical size, beyond what the readings say: other drivers, and the full set
of kernels where it is loaded at once. On the H200 the bare context is 0.69 of it, and everything
but NCCL 1.23."""

_CONVOLVES = ("convolution", "cudnn_convolution", "conv1d", "conv2d", "conv3d", "slow_conv")


def kind_of(ops: Iterable[str]) -> Kind:
    """Return the kind of a model whose ops are known by name.

    >>> kind_of(["aten::mm", "aten::add.Tensor"]), kind_of(["aten::convolution_backward"])
    ('products', 'convolutions')
    """
    for op in ops:
        if any(name in op for name in _CONVOLVES):
            return "convolutions"
    return "products"


def peak_range(
    reserved_bytes: int, context_bytes: int, kind: Kind = "convolutions", *, world_size: int = 1
) -> tuple[int, int]:
    """Return the least and the most that a run may hold on the device, nine times out of ten.

    Args:
        reserved_bytes: as predicted.
        context_bytes: typical of the card, for one process without NCCL.
        kind: of the model, by its kernels.
        world_size: GPUs that train together; from two on NCCL's buffers are on the device.

    >>> low, high = peak_range(10 * 2**30, 2**29)
    >>> round(low / 2**30, 1), round(high / 2**30, 1)
    (9.9, 11.9)
    >>> peak_range(10 * 2**30, 2**29, "products")[1] < high
    True
    """
    needed = NEEDED[kind]
    low, high = (
        round(reserved_bytes * (1 + needed[percentile]) + share * context_bytes)
        for percentile, share in zip((LOW, HIGH), CONTEXTS, strict=True)
    )
    return low, high + nccl_bytes(world_size)


def nccl_bytes(world_size: int) -> int:
    """Return what NCCL's buffers take on each of several GPUs.

    >>> nccl_bytes(1), nccl_bytes(2) == nccl_bytes(8) > 2**28
    (0, True)
    """
    return CONTEXT_READINGS["NCCL, one rank"] if world_size > 1 else 0


def likelihood_of(
    reserved_bytes: int,
    usable_bytes: int,
    kind: Kind = "convolutions",
    *,
    context_bytes: int = 0,
    world_size: int = 1,
) -> float:
    """Return how likely a run that is predicted to reserve some bytes fits into the usable ones.

    Between 0.01 and 0.99, because nothing is known beyond the measured errors; at most 0.95 where
    the card has less than the most of `peak_range`.

    >>> likelihood_of(100, 90), likelihood_of(100, 110) >= 0.95, likelihood_of(100, 200)
    (0.01, True, 0.99)
    >>> likelihood_of(100, 200, context_bytes=110)
    0.95
    """
    _, most = peak_range(reserved_bytes, context_bytes, kind, world_size=world_size)
    is_above = most > usable_bytes + context_bytes
    spare = usable_bytes / reserved_bytes - 1
    return min(_share_of_runs(spare, kind), HIGH / 100 if is_above else 1.0)


def _share_of_runs(spare: float, kind: Kind) -> float:
    """Return the share of runs that needed no more than a share beyond what was predicted."""
    percentiles, shares = list(NEEDED[kind]), list(NEEDED[kind].values())
    above = bisect_right(shares, spare)
    if above == 0 or above == len(shares):
        return percentiles[min(above, len(shares) - 1)] / 100
    low, high = shares[above - 1], shares[above]
    between = percentiles[above] - percentiles[above - 1]
    return (percentiles[above - 1] + between * (spare - low) / (high - low)) / 100


SIMULATED_HEADROOM = 0.10
"""The share that a tuner leaves free on a simulated GPU by default.

With it a ceiling is at least 95 % likely to hold. It is a round figure, so that plans stay what
they are when the errors are taken again: 0.09 would do by those of convolutions.
"""

MEASURED_HEADROOM = 0.05
"""The default where windows run on the GPU itself, and only later changes are unknown."""
