"""The cards that the bench plays: those of the catalogue, with what PyTorch reads of them besides.

Invariant: capacity, capability, multiprocessors and context are the catalogue's; everything else
here does not change what fits, but for the limits of a multiprocessor, by which kernels choose
their temporaries.
"""

from __future__ import annotations

from dataclasses import dataclass

from autobatch.gpus.catalogue import GpuSpec
from autobatch.support.units import MIB

__all__ = ["MODELS", "described"]

KIB = 1024


@dataclass(frozen=True)
class Model:
    """A card as a driver describes it: its name, L2 cache, clock and width of the memory's bus."""

    name: str
    l2_mib: float
    clock_mhz: int
    bus_bits: int


MODELS = {
    "t4": Model("Tesla T4", 4, 1590, 256),
    "p100-16gb": Model("Tesla P100-PCIE-16GB", 4, 1329, 4096),
    "v100-16gb": Model("Tesla V100-SXM2-16GB", 6, 1530, 4096),
    "v100-32gb": Model("Tesla V100-SXM2-32GB", 6, 1530, 4096),
    "rtx-2080-ti": Model("NVIDIA GeForce RTX 2080 Ti", 5.5, 1545, 352),
    "rtx-3060": Model("NVIDIA GeForce RTX 3060", 2.25, 1777, 192),
    "rtx-3060-laptop": Model("NVIDIA GeForce RTX 3060 Laptop GPU", 3, 1425, 192),
    "rtx-3070": Model("NVIDIA GeForce RTX 3070", 4, 1725, 256),
    "rtx-3080-10gb": Model("NVIDIA GeForce RTX 3080", 5, 1710, 320),
    "rtx-3080-12gb": Model("NVIDIA GeForce RTX 3080", 6, 1710, 384),
    "rtx-3090": Model("NVIDIA GeForce RTX 3090", 6, 1695, 384),
    "rtx-4060": Model("NVIDIA GeForce RTX 4060", 24, 2460, 128),
    "rtx-4060-laptop": Model("NVIDIA GeForce RTX 4060 Laptop GPU", 32, 2370, 128),
    "rtx-4070": Model("NVIDIA GeForce RTX 4070", 36, 2475, 192),
    "rtx-4080": Model("NVIDIA GeForce RTX 4080", 64, 2505, 256),
    "rtx-4090": Model("NVIDIA GeForce RTX 4090", 72, 2520, 384),
    "rtx-5080": Model("NVIDIA GeForce RTX 5080", 64, 2617, 256),
    "rtx-5090": Model("NVIDIA GeForce RTX 5090", 96, 2407, 512),
    "rtx-a6000": Model("NVIDIA RTX A6000", 6, 1800, 384),
    "a10g": Model("NVIDIA A10G", 6, 1710, 384),
    "a30": Model("NVIDIA A30", 24, 1440, 3072),
    "a40": Model("NVIDIA A40", 6, 1740, 384),
    "l4": Model("NVIDIA L4", 48, 2040, 192),
    "l40": Model("NVIDIA L40", 96, 2490, 384),
    "l40s": Model("NVIDIA L40S", 96, 2520, 384),
    "a100-40gb": Model("NVIDIA A100-SXM4-40GB", 40, 1410, 5120),
    "a100-80gb": Model("NVIDIA A100-SXM4-80GB", 40, 1410, 5120),
    "h100-pcie": Model("NVIDIA H100 PCIe", 50, 1755, 5120),
    "h100-80gb": Model("NVIDIA H100 80GB HBM3", 50, 1980, 5120),
    "h100-nvl": Model("NVIDIA H100 NVL", 60, 1785, 6144),
    "gh200": Model("NVIDIA GH200 480GB", 60, 1980, 6144),
    "h200": Model("NVIDIA H200", 60, 1980, 6144),
    "b200": Model("NVIDIA B200", 126, 1965, 8192),
    "gb10": Model("NVIDIA GB10", 24, 2418, 256),
}
"""NVIDIA's data sheets and deviceQuery in public logs."""

_UNKNOWN = Model("Simulated Card", 40, 1410, 5120)


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor holds: CUDA C++ Programming Guide, compute capabilities."""

    shared_kib: int
    block_shared_kib: int
    threads: int
    blocks: int
    fp64_ratio: int


_LIMITS = {
    (6, 0): Limits(64, 48, 2048, 32, 2),
    (7, 0): Limits(96, 96, 2048, 32, 2),
    (7, 5): Limits(64, 64, 1024, 16, 32),
    (8, 0): Limits(164, 163, 2048, 32, 2),
    (8, 6): Limits(100, 99, 1536, 16, 32),
    (8, 9): Limits(100, 99, 1536, 24, 64),
    (9, 0): Limits(228, 227, 2048, 32, 2),
    (10, 0): Limits(228, 227, 2048, 32, 2),
    (12, 0): Limits(100, 99, 1536, 24, 64),
    (12, 1): Limits(100, 99, 1536, 24, 64),
}


def described(spec: GpuSpec, code_version: int) -> str:
    """Return a card as the simulated runtime reads it (`src/gpu.c`): "field=value,field=value".

    Args:
        spec: the card.
        code_version: of the code that PyTorch's binaries have for it, such as 86 on an RTX 4090.
    """
    model = MODELS.get(spec.name, _UNKNOWN)
    limits = _LIMITS[spec.compute_capability]
    bandwidth = spec.bandwidth_bytes_per_s or 0
    figures = {
        "major": spec.compute_capability[0],
        "minor": spec.compute_capability[1],
        "code_version": code_version,
        "multiprocessors": spec.multiprocessors,
        "capacity": spec.capacity_bytes,
        "context": spec.context_bytes,
        "l2": int(model.l2_mib * MIB),
        "shared": limits.shared_kib * KIB,
        "block_shared": limits.block_shared_kib * KIB,
        "threads": limits.threads,
        "blocks": limits.blocks,
        "fp64_ratio": limits.fp64_ratio,
        "clock_khz": model.clock_mhz * 1000,
        "memory_clock_khz": bandwidth * 8 // model.bus_bits // 2 // 1000,  # two transfers a cycle
        "bus_bits": model.bus_bits,
    }
    return ",".join([f"name={model.name}", *(f"{key}={value}" for key, value in figures.items())])
