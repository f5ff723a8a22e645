"""The workspaces of cuBLAS and cuBLASLt, which matrix products share and keep.

cuBLAS takes a workspace per handle and stream from the caching allocator and keeps it; PyTorch
has one handle per thread, so training holds two: the main thread's and the autograd thread's. It
is taken as the first product runs, after its output. `addmm` with a bias in one dimension runs
through cuBLASLt, which has a workspace of its own in older versions of PyTorch, and shares that of
cuBLAS since 2.12 (PyTorch's pull requests 168175 and 173002; an H200 has both on 2.11).

Sizes and keeping: `aten/src/ATen/cuda/CublasHandlePool.cpp`. Which products run through cuBLASLt:
`addmm_out_cuda_impl` in `aten/src/ATen/native/cuda/Blas.cpp`.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.support.torch_private import torch_version
from autobatch.support.units import KIB, MIB

__all__ = ["copied_operands", "cublas_bytes", "cublaslt_bytes", "is_product", "uses_cublaslt"]

_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in ("mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "addmv", "mv", "dot", "vdot")
)
_WITH_BIAS = (torch.ops.aten.addmm.default, torch.ops.aten._addmm_activation.default)
_CONFIG = re.compile(r":(\d+):(\d+)")
_SHARED_SINCE = (2, 12)


@functools.cache
def is_product(func: Any) -> bool:
    """Whether an op is a matrix product that cuBLAS runs."""
    return func._schema.name in _PRODUCTS


def copied_operands(args: Sequence[Any]) -> list[int]:
    """Return the bytes of each matrix that is copied, as neither its rows nor columns are dense.

    A gradient that is one number, expanded, is such a matrix. From `prepare_matrix_for_cublas` and
    `prepare_batch_matrix_for_cublas` in `aten/src/ATen/native/cuda/Blas.cpp`.
    """
    matrices = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() >= 2][-2:]
    return [matrix.nbytes for matrix in matrices if not _is_dense(matrix)]


def _is_dense(matrix: Tensor) -> bool:
    rows, columns = matrix.shape[-2:]
    down, along = matrix.stride()[-2:]
    return (along == 1 and down >= max(1, columns)) or (down == 1 and along >= max(1, rows))


def uses_cublaslt(func: Any, args: Sequence[Any]) -> bool:
    """Whether a matrix product adds its bias in cuBLASLt."""
    if func not in _WITH_BIAS:
        return False
    bias, first, second = args[:3]
    return bool(
        bias.dim() == 1
        and bias.is_contiguous()
        and bias.shape[0] == second.shape[1]
        and first.is_floating_point()
        and min(second.shape) > 1
    )


def cublas_bytes(capability: tuple[int, int]) -> int:
    """Return the bytes of one cuBLAS workspace on a card of this compute capability.

    `CUBLAS_WORKSPACE_CONFIG` overrides them.

    >>> cublas_bytes((8, 0)), cublas_bytes((9, 0))
    (8519680, 33554432)
    """
    configured = _CONFIG.findall(os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if configured:
        return sum(int(size) * int(count) for size, count in configured) * KIB
    if capability[0] in (9, 10, 12):
        return 32 * MIB
    return (4096 * 2 + 16 * 8) * KIB


def cublaslt_bytes() -> int:
    """Return the bytes of a workspace of cuBLASLt's own; 0 where it shares that of cuBLAS.

    `TORCH_CUBLASLT_UNIFIED_WORKSPACE` and `CUBLASLT_WORKSPACE_SIZE`, in KiB, override them.
    """
    shares = os.environ.get("TORCH_CUBLASLT_UNIFIED_WORKSPACE")
    if shares == "1" or (shares != "0" and torch_version() >= _SHARED_SINCE):
        return 0
    size = os.environ.get("CUBLASLT_WORKSPACE_SIZE", "")
    return int(size) * KIB if size.isdigit() else MIB
