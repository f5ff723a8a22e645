"""Memory that CUDA libraries take and no tensor shows.

cuBLAS takes a workspace per handle and stream from the caching allocator and keeps it; PyTorch
has one handle per thread, so training holds two: the main thread's and the autograd thread's.
Sizes: `aten/src/ATen/cuda/CublasHandlePool.cpp`; `CUBLAS_WORKSPACE_CONFIG` overrides them.

cuDNN convolutions take a workspace while they run. cuDNN chooses it by shape, and one part of it is
known: kernels for tensor cores work in NHWC, and convert tensors that are in NCHW into the
workspace. Public profiles of PyTorch on Ampere and later cards name such kernels for both gradients
(`xmma_dgrad` and `xmma_wgrad…nhwckrsc_nhwc`) and, beside them, `nchwToNhwcKernel` and
`nhwcToNchwKernel`. In forward passes they name kernels that convert both activations, one or none.
As a lower bound, these are counted as converting none: forward passes, grouped convolutions, 1 x 1
ones (a matrix product in either layout), and all of those on cards whose tensor cores are at most
twice as fast as their other cores (most GeForce cards), where a conversion does not pay. Tables of
measured peaks tell the same two kinds of cards apart, see `reports/accuracy`.

Several kernels copy inputs that are not contiguous before they read them (`contiguous()` in
`aten/src/ATen/native/cudnn/ConvShared.cpp` and `BatchNorm.cpp`, and in `SoftMax.cu`,
`layer_norm_kernel.cu`, `group_norm_kernel.cu`, `AveragePool2d.cu` and `DilatedMaxPool2d.cu` of
`aten/src/ATen/native/cuda`).
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

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
        workspaces = _convolution_workspaces(func, args, self._spec)
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

    An input in NHWC or NDHWC is not copied either.
    """
    return [
        args[position].nbytes
        for position in _COPIED.get(func, ())
        if not args[position].is_contiguous() and not _is_channels_last(args[position])
    ]


_PRECISIONS = {
    torch.float32: ("tf32", (8, 0)),
    torch.bfloat16: ("bf16", (8, 0)),
    torch.float16: ("fp16", (7, 0)),
}
"""By dtype: the precision of tensor cores for it, and the first compute capability with that."""

_CONVOLUTION = torch.ops.aten.convolution.default
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


def _convolution_workspaces(
    func: Any, args: Sequence[Any], gpu: GpuSpec
) -> Iterator[tuple[int, int]]:
    """Yield the workspaces that a convolution takes and gives back while it runs.

    Args:
        func: the op; others than convolutions have none.
        args: its arguments.
        gpu: the card; without figures of its speed, it is taken for one with fast tensor cores.

    Yields:
        The bytes of a workspace, and how many of the op's results are made before it is taken.
    """
    if func is _CONVOLUTION:
        data, weight, _, stride, padding, dilation, transposed, extra, groups = args
        # a transposed convolution runs the kernel of a data gradient
        if transposed and _converts(data, weight, groups, gpu):
            written = _transposed_bytes(data, weight, stride, padding, dilation, extra)
            yield data.nbytes + weight.nbytes + written, 1
        return
    if func is not _CONVOLUTION_BACKWARD:
        return
    gradient, data, weight, _, _, _, _, transposed, _, groups, wanted = args
    if _converts(data, weight, groups, gpu):
        converted = gradient.nbytes + data.nbytes + weight.nbytes
        if wanted[0] and not transposed:  # a transposed one's data gradient is a forward pass
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
    elements: int = data.shape[0] * weight.shape[1] * math.prod(written)
    return elements * data.element_size()


def _converts(data: Tensor, weight: Tensor, groups: int, gpu: GpuSpec) -> bool:
    """Whether cuDNN would convert the layout of a convolution's tensors."""
    if not torch.backends.cudnn.enabled or groups != 1 or math.prod(weight.shape[2:]) == 1:
        return False
    precision, since = _PRECISIONS.get(data.dtype, ("", (99, 0)))
    if gpu.compute_capability < since or (precision == "tf32" and not _allows_tf32()):
        return False
    ordinary, on_tensor_cores = gpu.flops.get("fp32", 0), gpu.flops.get(precision, math.inf)
    return on_tensor_cores > 2 * ordinary and not any(map(_is_channels_last, (data, weight)))


def _allows_tf32() -> bool:
    settings: Any = torch.backends.cudnn  # the older `allow_tf32` sets this one too
    return settings.conv.fp32_precision == "tf32"  # type: ignore[no-any-return]


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is in NHWC or NDHWC, and not in NCHW at the same time."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return (
        layout is not None
        and tensor.is_contiguous(memory_format=layout)
        and not tensor.is_contiguous()
    )
