"""Memory that CUDA libraries take and no tensor shows.

cuBLAS takes a workspace per handle and stream from the caching allocator and keeps it; PyTorch
has one handle per thread, so training holds two: the main thread's and the autograd thread's.
Sizes: `aten/src/ATen/cuda/CublasHandlePool.cpp`; `CUBLAS_WORKSPACE_CONFIG` overrides them.

cuDNN's workspaces are in `convolutions.py`.

Several kernels copy inputs that are not contiguous before they read them (`contiguous()` in
`aten/src/ATen/native/cudnn/ConvShared.cpp` and `BatchNorm.cpp`, and in `SoftMax.cu`,
`layer_norm_kernel.cu`, `group_norm_kernel.cu`, `AveragePool2d.cu` and `DilatedMaxPool2d.cu` of
`aten/src/ATen/native/cuda`).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from autobatch.devices.virtual.kernels.convolutions import (
    CONVOLUTION,
    CONVOLUTION_BACKWARD,
    convolution_workspaces,
    is_channels_last,
)
from autobatch.devices.virtual.recorder import StorageRecorder
from autobatch.gpus.catalogue import GpuSpec
from autobatch.support.torch_private import FakeTensor
from autobatch.support.units import KIB, MIB

__all__ = ["Workspaces"]


class Workspaces:
    """Logs the allocations of libraries beside those of tensors."""

    def __init__(self, recorder: StorageRecorder, spec: GpuSpec, device: torch.device):
        """Log in `recorder` what the GPU `spec` would take for ops on `device`."""
        self._recorder = recorder
        self._spec = spec
        self._device = device
        self._have_handle: set[bool] = set()  # of the two threads: whether it runs backward

    def before(self, func: Any, args: Sequence[Any]) -> Callable[[], None] | None:
        """Log what an op takes beside its results; return what to call when it has run, if any."""
        if not _takes_workspace(func) or not any(map(self._is_on_device, args)):
            return None
        in_backward = self._recorder.phase == "backward"
        if _uses_cublas(func) and in_backward not in self._have_handle:
            self._have_handle.add(in_backward)
            size_bytes = _cublas_workspace_bytes(self._spec.compute_capability)
            self._recorder.hidden(size_bytes, "cublas workspace")
        workspaces = convolution_workspaces(func, args, self._spec)
        self._recorder.expect(workspaces, "cudnn workspace")
        copies = [self._recorder.hidden(n, "contiguous") for n in _contiguous_copies(func, args)]
        return functools.partial(self._recorder.free, copies) if copies else None

    def _is_on_device(self, value: Any) -> bool:
        return isinstance(value, FakeTensor) and value.fake_device == self._device


_CUBLAS = frozenset(
    f"aten::{name}"
    for name in ("mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "addmv", "mv", "dot", "vdot")
)


@functools.cache
def _uses_cublas(func: Any) -> bool:
    """Whether an op is a matrix product that cuBLAS runs."""
    return func._schema.name in _CUBLAS


@functools.cache
def _takes_workspace(func: Any) -> bool:
    """Whether an op may take memory beside its result's."""
    return func in _COPIED or _uses_cublas(func)  # convolutions are among the former


_CONFIG = re.compile(r":(\d+):(\d+)")


def _cublas_workspace_bytes(capability: tuple[int, int]) -> int:
    """Return the bytes of one cuBLAS workspace on a card of this compute capability.

    >>> _cublas_workspace_bytes((8, 0)), _cublas_workspace_bytes((9, 0))
    (8519680, 33554432)
    """
    configured = _CONFIG.findall(os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if configured:
        return sum(int(size) * int(count) for size, count in configured) * KIB
    if capability[0] in (9, 10, 12):
        return 32 * MIB
    return (4096 * 2 + 16 * 8) * KIB


_COPIED = {
    op: positions
    for positions, names in {
        (0,): """
            convolution native_batch_norm native_layer_norm native_group_norm _softmax _log_softmax
            avg_pool2d avg_pool2d_backward max_pool2d_with_indices max_pool2d_with_indices_backward
        """,
        (0, 1): """
            convolution_backward native_batch_norm_backward native_layer_norm_backward
            native_group_norm_backward _softmax_backward_data _log_softmax_backward_data
        """,
    }.items()
    for name in names.split()
    for op in [getattr(torch.ops.aten, name).default]
}


def _contiguous_copies(func: Any, args: Sequence[Any]) -> list[int]:
    """Return the bytes of each copy that a kernel makes of its inputs, and drops at its end.

    An input in NHWC or NDHWC is not copied either. cuDNN wants all tensors of a convolution in the
    same layout, so a weight in NCHW is copied where the data is in NHWC.
    """
    tensors = [args[position] for position in _COPIED.get(func, ())]
    first = {CONVOLUTION: 0, CONVOLUTION_BACKWARD: 1}.get(func)
    if first is not None and any(map(is_channels_last, args[first : first + 2])):
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}[args[first].dim()]
        tensors = list(args[: first + 2])
        return [each.nbytes for each in tensors if not each.is_contiguous(memory_format=layout)]
    return [
        each.nbytes for each in tensors if not each.is_contiguous() and not is_channels_last(each)
    ]
