"""Memory that CUDA libraries take and no tensor shows.

cuBLAS takes a workspace per handle and stream from the caching allocator and keeps it; PyTorch
has one handle per thread, so training holds two: the main thread's and the autograd thread's.
Sizes: `aten/src/ATen/cuda/CublasHandlePool.cpp`; `CUBLAS_WORKSPACE_CONFIG` overrides them.

cuDNN convolutions take a workspace while they run. Which one is cuDNN's own choice, by shape; one
part of it is known: its kernels for tensor cores work in NHWC, and convert tensors that are in NCHW
into the workspace. Public profiles of PyTorch on Ampere and later cards name the kernels of both
gradients (`xmma_dgrad` and `xmma_wgrad…nhwckrsc_nhwc`) and, beside them, `nchwToNhwcKernel` and
`nhwcToNchwKernel`. In forward passes they name kernels that convert both activations, one or none;
those are counted as none, as are grouped convolutions, 1 x 1 ones (a matrix product in either
layout) and kernels without tensor cores: a lower bound.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.units import KIB, MIB

__all__ = ["CONVOLUTIONS", "USES_CUBLAS", "convolution_workspaces", "cublas_workspace_bytes"]

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


_CONVOLUTION = torch.ops.aten.convolution.default
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
CONVOLUTIONS = frozenset((_CONVOLUTION, _CONVOLUTION_BACKWARD))


def convolution_workspaces(
    func: Any, args: Sequence[Any], capability: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """Yield the workspaces that a convolution takes and gives back while it runs.

    Args:
        func: one of `CONVOLUTIONS`.
        args: its arguments.
        capability: compute capability of the card.

    Yields:
        The bytes of a workspace, and how many of the op's results are made before it is taken.
    """
    if func is _CONVOLUTION:
        data, weight, _, *geometry, transposed, extra, groups = args
        # a transposed convolution runs the kernel of a data gradient
        if transposed and _converts(data, weight, groups, capability):
            written = _transposed_bytes(data, weight, *geometry, extra)
            yield data.nbytes + weight.nbytes + written, 1
        return
    gradient, data, weight, _, _, _, _, transposed, _, groups, wanted = args
    if _converts(data, weight, groups, capability):
        converted = gradient.nbytes + data.nbytes + weight.nbytes
        if wanted[0] and not transposed:  # the data gradient of that one is a forward pass
            yield converted, 1
        if wanted[1]:
            yield converted, 1 + wanted[0]


def _transposed_bytes(
    data: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    extra: Sequence[int],
) -> int:
    """Return the bytes of what a transposed convolution writes."""
    sides = zip(data.shape[2:], weight.shape[2:], stride, padding, dilation, extra, strict=True)
    written = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, p, d, e in sides]
    return data.shape[0] * weight.shape[1] * math.prod(written) * data.element_size()


def _converts(data: Tensor, weight: Tensor, groups: int, capability: tuple[int, int]) -> bool:
    """Whether cuDNN would convert the layout of a convolution's tensors."""
    if not torch.backends.cudnn.enabled or groups != 1 or math.prod(weight.shape[2:]) == 1:
        return False
    if data.dtype is torch.float32:
        tensor_cores = capability >= (8, 0) and torch._C._get_cudnn_allow_tf32()
    elif data.dtype is torch.bfloat16:
        tensor_cores = capability >= (8, 0)
    else:
        tensor_cores = data.dtype is torch.float16 and capability >= (7, 0)
    return tensor_cores and not any(map(_is_channels_last, (data, weight)))


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is in NHWC or NDHWC, and not in NCHW at the same time."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return (
        layout is not None
        and tensor.is_contiguous(memory_format=layout)
        and not tensor.is_contiguous()
    )
