"""Memory that CUDA libraries take and no tensor shows.

cuBLAS takes a workspace per handle and stream from the caching allocator and keeps it; PyTorch
has one handle per thread, so training holds two: the main thread's and the autograd thread's.
Sizes: `aten/src/ATen/cuda/CublasHandlePool.cpp`; `CUBLAS_WORKSPACE_CONFIG` overrides them.
"""

from __future__ import annotations

import os
import re

from autobatch.units import KIB, MIB

__all__ = ["USES_CUBLAS", "cublas_workspace_bytes"]

USES_CUBLAS = frozenset(
    f"aten::{name}"
    for name in ("mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "addmv", "mv", "dot", "vdot")
)

_CONFIG = re.compile(r":(\d+):(\d+)")


def cublas_workspace_bytes(capability: tuple[int, int]) -> int:
    """Return the bytes of one cuBLAS workspace on a card of this compute capability.

    >>> cublas_workspace_bytes((8, 0)), cublas_workspace_bytes((9, 0))
    (8519680, 33554432)
    """
    configured = _CONFIG.findall(os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if configured:
        return sum(int(size) * int(count) for size, count in configured) * KIB
    if capability[0] in (9, 10, 12):
        return 32 * MIB
    return (4096 * 2 + 16 * 8) * KIB
