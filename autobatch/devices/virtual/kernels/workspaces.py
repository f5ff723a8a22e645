"""Memory that kernels and libraries take and no tensor shows.

Matrix products keep a workspace of cuBLAS (`matrix_products.py`). Everything else here is scratch:
a kernel takes it beside its results and gives it back. That of convolutions is in
`convolutions.py`, that of sums in `reductions.py`.

Several kernels copy inputs that are not contiguous before they read them (`contiguous()` in
`SoftMax.cu`, `AveragePool2d.cu` and `DilatedMaxPool2d.cu` of `aten/src/ATen/native/cuda`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels import rnn
from autobatch.devices.virtual.kernels.attention_scratch import ATTENTION, attention_scratch
from autobatch.devices.virtual.kernels.calls import Hashed, Rule, described, steps_of
from autobatch.devices.virtual.kernels.cells import CELLS, cell_scratch
from autobatch.devices.virtual.kernels.columns import COLUMNS, column_scratch
from autobatch.devices.virtual.kernels.convolutions import (
    CONVOLUTION,
    CONVOLUTION_BACKWARD,
    convolution_scratch,
    convolution_settings,
)
from autobatch.devices.virtual.kernels.indexing import INDEXING, indexing_scratch
from autobatch.devices.virtual.kernels.losses import LOSSES, loss_scratch
from autobatch.devices.virtual.kernels.matrix_products import (
    copied_operands,
    cublas_bytes,
    cublaslt_bytes,
    is_product,
    uses_cublaslt,
)
from autobatch.devices.virtual.kernels.memory_formats import layout_of
from autobatch.devices.virtual.kernels.norms import NORMS, norm_scratch
from autobatch.devices.virtual.kernels.reductions import REDUCTIONS, reduction_scratch
from autobatch.devices.virtual.kernels.sizes import copies_of
from autobatch.devices.virtual.recorder import StorageRecorder, Takes
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.scratch import RESULT, RESULTS, Steps
from autobatch.support.torch_private import FakeTensor

__all__ = ["Workspaces"]


class _Product(NamedTuple):
    """A matrix product: the bytes of what is copied for it, and whether it runs in cuBLASLt."""

    copies: Sequence[int]
    takes_cublaslt: bool


class _Scratch(NamedTuple):
    """A kernel that may take scratch; as in `Kernel`."""

    kind: Hashable
    name: str
    numbers: tuple[int, ...]
    takes: Takes


_Call = _Product | _Scratch


class Workspaces:
    """Logs the allocations of kernels and libraries beside those of tensors."""

    def __init__(self, recorder: StorageRecorder, spec: GpuSpec, device: torch.device):
        """Log in `recorder` what the GPU `spec` would take for ops on `device`."""
        self._recorder = recorder
        self._spec = spec
        self._key = Hashed(spec)
        self._device = device
        self._kept: set[tuple[str, bool]] = set()  # by library, and whether it runs backward

    def call_of(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call | None:
        """Return what a call of an op takes beside its results, if anything.

        It depends on nothing but the layouts of the arguments, and the settings of convolutions.
        """
        if is_product(func):
            if any(map(self._is_on_device, args)):
                return _Product(copied_operands(args), uses_cublaslt(func, args))
            return None
        found = _RULES.get(func)
        if found is None or not self._is_here(args):
            return None
        name, rule = found
        if rule is _convolution:  # the rule may be asked again when they are others
            kwargs = {**kwargs, "settings": convolution_settings()}
        shape, numbers = described(args, kwargs)
        takes = functools.partial(steps_of, rule, func, shape, self._key)
        return _Scratch((func, shape), name, numbers, takes)

    def begun(self, call: _Call | None) -> Callable[[], None] | None:
        """Log what a call takes before its results; return what to call when it has run, if any."""
        if call is None or self._recorder.is_muted:
            return None
        if type(call) is _Product:
            return lambda: self._multiplied(call)
        self._recorder.runs(*call)
        return self._recorder.ended

    def _multiplied(self, product: _Product) -> None:
        taken = [self._recorder.hidden(size_bytes, "contiguous") for size_bytes in product.copies]
        self._keep_workspaces(product.takes_cublaslt)
        self._recorder.free(taken)

    def _keep_workspaces(self, takes_cublaslt: bool) -> None:
        """Log the workspaces that this thread's first product takes, after its output."""
        in_backward = self._recorder.phase == "backward"
        own = cublas_bytes(self._spec.compute_capability)
        for name, size_bytes in (
            ("cublas", own),
            ("cublaslt", cublaslt_bytes() if takes_cublaslt else 0),
        ):
            if size_bytes and (name, in_backward) not in self._kept:
                self._kept.add((name, in_backward))
                self._recorder.hidden(size_bytes, f"{name} workspace", is_kept=True)

    def _is_here(self, args: Sequence[Any]) -> bool:
        tensors = args[0] if args and isinstance(args[0], (list, tuple)) else args
        return any(map(self._is_on_device, tensors))

    def _is_on_device(self, value: Any) -> bool:
        return isinstance(value, FakeTensor) and value.fake_device == self._device


_POOLS = tuple(
    getattr(torch.ops.aten, name).default
    for name in """
        avg_pool2d avg_pool2d_backward max_pool2d_with_indices max_pool2d_with_indices_backward
    """.split()
)
_UPSAMPLED = tuple(
    getattr(torch.ops.aten, f"{name}_backward").default
    for name in """
        upsample_nearest1d upsample_linear1d upsample_nearest2d upsample_bilinear2d
        upsample_bicubic2d upsample_nearest3d upsample_trilinear3d
    """.split()
)


def _pool(func: Any, args: Any, kwargs: Any, gpu: GpuSpec) -> Steps:
    """Return copies of what is not dense in the layout of the input, the gradient's before that."""
    is_backward = func._schema.name.endswith("_backward")
    tensors = args[:2] if is_backward else args[:1]
    layout = layout_of(tensors[-1])
    copies = [each.nbytes for each in tensors if not each.is_contiguous(memory_format=layout)]
    return [RESULTS, *copies] if copies else ()


def _upsampled(func: Any, args: Any, kwargs: Any, gpu: GpuSpec) -> Steps:
    """Return the copy of a gradient that is dense neither in NCHW nor in NHWC."""
    gradient: Tensor = args[0]
    is_dense = gradient.is_contiguous(memory_format=layout_of(gradient))
    return () if is_dense or gradient.is_contiguous() else [RESULTS, gradient.nbytes]


def _convolution(func: Any, args: Any, kwargs: Any, gpu: GpuSpec) -> Steps:
    return convolution_scratch(func, args, gpu, kwargs["settings"])


def _log_softmax_backward(func: Any, args: Any, kwargs: Any, gpu: GpuSpec) -> Steps:
    return [RESULTS, *copies_of(*args[:2])]


def _softmax(func: Any, args: Any, kwargs: Any, gpu: GpuSpec) -> Steps:
    return [RESULTS, *copies_of(args[0])]


def _softmax_backward(func: Any, args: Any, kwargs: Any, gpu: GpuSpec) -> Steps:
    """Return the product of gradient and output (`softmax_backward_cuda_out` in `SoftMax.cu`)."""
    gradient, output = args[:2]
    copies = copies_of(gradient, output)
    element = torch.promote_types(gradient.dtype, output.dtype).itemsize
    return [RESULTS, *copies, output.numel() * element]


def _safe_softmax(func: Any, args: Any, kwargs: Any, gpu: GpuSpec) -> Steps:
    """Return which scores are masked, and which rows are as a whole, whose result is zero.

    From `_safe_softmax` in `aten/src/ATen/native/transformers/attention.cpp`.
    """
    data, dim = args[:2]
    rows = data.numel() // max(data.shape[dim], 1)
    return [RESULTS, *copies_of(data), data.numel(), rows, 4]


def _logsumexp(func: Any, args: Any, kwargs: Any, gpu: GpuSpec) -> Steps:
    """Return the largest elements, and the exponentials (`logsumexp_out_impl` in `ReduceOps.cpp`).

    The magnitudes of the former, and whether they are infinite, are gone before the latter.
    """
    data, dims = args[:2]
    if not data.is_floating_point() or not data.numel():
        return ()
    over = {dim % data.dim() for dim in dims} if dims and data.dim() else range(data.dim())
    kept = math.prod(size for place, size in enumerate(data.shape) if place not in over)
    largest = kept * data.element_size()
    return [largest, largest, kept, ~2, ~1, data.nbytes, RESULT]


def _euclidean_distances(func: Any, args: Any, kwargs: Any, gpu: GpuSpec) -> Steps:
    """Return norms and what is concatenated (`_euclidean_dist` in `Distance.cpp`)."""
    norms = [each.nbytes // max(each.shape[-1], 1) for each in args[:2]]
    (one, other), (first, second) = norms, [each.nbytes for each in args[:2]]
    return [
        *(first, one, ~0, one, second, other, ~3, other, first),
        *(first + 2 * one, ~2, ~1, ~6, second + 2 * other, ~4, ~5, RESULT),
    ]


def _roll(func: Any, args: Any, kwargs: Any, gpu: GpuSpec) -> Steps:
    """Return what every dimension but the last is rolled into (`roll_cuda` in `TensorShape.cu`)."""
    data, shifts = args[:2]
    count = len(shifts) if isinstance(shifts, (list, tuple)) else 1
    rolled = [data.nbytes] * (count - 1)
    if data.is_contiguous():
        return rolled
    return [data.nbytes, *rolled[:1], *[~0] * (count > 1), *rolled[1:]]


_RULES: dict[Any, tuple[str, Rule]] = {
    **dict.fromkeys(_POOLS, ("contiguous", _pool)),
    **dict.fromkeys(_UPSAMPLED, ("contiguous", _upsampled)),
    **dict.fromkeys((CONVOLUTION, CONVOLUTION_BACKWARD), ("cudnn workspace", _convolution)),
    **dict.fromkeys(NORMS, ("norm scratch", norm_scratch)),
    torch.ops.aten._softmax.default: ("contiguous", _softmax),
    torch.ops.aten._log_softmax.default: ("contiguous", _softmax),
    torch.ops.aten._log_softmax_backward_data.default: ("contiguous", _log_softmax_backward),
    torch.ops.aten._safe_softmax.default: ("softmax scratch", _safe_softmax),
    torch.ops.aten._softmax_backward_data.default: ("softmax scratch", _softmax_backward),
    torch.ops.aten.logsumexp.default: ("reduction scratch", _logsumexp),
    torch.ops.aten._euclidean_dist.default: ("distance scratch", _euclidean_distances),
    torch.ops.aten.roll.default: ("roll scratch", _roll),
    **dict.fromkeys(CELLS, ("reduction scratch", cell_scratch)),
    **dict.fromkeys(COLUMNS, ("column scratch", column_scratch)),
    **dict.fromkeys(LOSSES, ("loss scratch", loss_scratch)),
    **dict.fromkeys((rnn.FORWARD, rnn.BACKWARD), ("cudnn scratch", rnn.scratch)),
    **dict.fromkeys(ATTENTION, ("attention scratch", attention_scratch)),
    **dict.fromkeys(INDEXING, ("indexing scratch", indexing_scratch)),
    **dict.fromkeys(REDUCTIONS, ("reduction scratch", reduction_scratch)),
}
"""By op: what its scratch is called, and what says it."""
