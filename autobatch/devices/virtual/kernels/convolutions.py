"""Memory that convolutions take while they run: copies in another layout, and cuDNN's workspaces.

cuDNN wants all tensors in one layout, NHWC where the input or the weight is in it
(`cudnn_conv_suggest_memory_format` in `aten/src/ATen/native/ConvUtils.h`), and its results are. A
forward pass copies what is in another layout; a backward pass copies data and gradient first, and
keeps both to its end (`aten/src/ATen/native/cudnn/ConvShared.cpp`, and `Convolution.cpp` there).

cuDNN chooses a workspace by shape. On compute capability 9.0 a GPU was measured, and
`cudnn_sm90.py` has the rule. That rule is not taken for other cards: on an A100, published peaks of
timm models fit worse when forward passes convert as well (`reports/accuracy`, "Causes found"), and
for the rest nothing is published of single layers.

On those cards one part of a workspace is known: kernels for tensor cores work in NHWC, and convert
tensors that are in NCHW into the workspace. Public profiles of PyTorch on Ampere and later cards
name such kernels for both gradients (`xmma_dgrad` and `xmma_wgrad…nhwckrsc_nhwc`) and, beside them,
`nchwToNhwcKernel` and `nhwcToNchwKernel`. In forward passes they name kernels that convert both
activations, one or none. As a lower bound, these are counted as converting none: forward passes,
grouped convolutions, 1 x 1 ones (a matrix product in either layout), and all of those on cards
whose tensor cores are at most twice as fast as their other cores (most GeForce cards), where a
conversion does not pay. Tables of measured peaks tell the same two kinds of cards apart, see
`reports/accuracy`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels.cudnn_sm90 import (
    Convolution,
    Direction,
    Precision,
    workspace_bytes,
)
from autobatch.devices.virtual.kernels.memory_formats import layout_of
from autobatch.devices.virtual.kernels.reductions import reduction_scratch
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.scratch import RESULT, Step, Steps

__all__ = [
    "CONVOLUTION",
    "CONVOLUTION_BACKWARD",
    "convolution_scratch",
    "convolution_settings",
    "cudnn_bytes",
    "runs_without_cudnn",
]

_PRECISIONS = {
    torch.float32: ("tf32", (8, 0)),
    torch.bfloat16: ("bf16", (8, 0)),
    torch.float16: ("fp16", (7, 0)),
}
"""By dtype: the precision of tensor cores for it, and the first compute capability with that."""

CONVOLUTION = torch.ops.aten.convolution.default
CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default

_MEASURED = (9, 0)
"""The compute capability whose cards have a measured rule."""


def convolution_settings() -> tuple[bool, bool]:
    """Return what of PyTorch's settings counts: whether cuDNN is on, and TF32 allowed."""
    settings: Any = torch.backends.cudnn  # the older `allow_tf32` sets this one too
    return bool(settings.enabled), settings.conv.fp32_precision == "tf32"


def convolution_scratch(
    func: Any, args: Sequence[Any], gpu: GpuSpec, settings: Sequence[bool] | None = None
) -> Steps:
    """Return the copies that a convolution makes, its workspaces, and the sum of its bias.

    Args:
        func: `CONVOLUTION` or `CONVOLUTION_BACKWARD`.
        args: its arguments.
        gpu: the card; without figures of its speed, it is taken for one with fast tensor cores.
        settings: as `convolution_settings` returns them; None for those of now.
    """
    is_on, allows_tf32 = convolution_settings() if settings is None else settings
    is_forward = func is CONVOLUTION
    data, weight = args[:2] if is_forward else args[1:3]
    how = args[3:9] if is_forward else args[4:10]
    kernel = _Kernel()
    if data.dim() == 3:  # it is copied, and one that looks like NHWC is not taken for it
        data = kernel.relaid(data, torch.contiguous_format)
    layout = layout_of(data, weight)

    def works(direction: Direction) -> None:
        layer = _layer(allows_tf32, data, weight, *how) if is_on else None
        size_bytes = 0 if layer is None else cudnn_bytes(direction, layer, data.dtype, gpu)
        kernel.take("cudnn workspace", size_bytes)

    if is_forward:
        data = kernel.relaid(data, layout)
        kernel.steps.append(RESULT)
        kernel.relaid(weight, layout)
        works("forward")
        return kernel.steps
    gradient, wanted = args[0], args[10]
    if runs_without_cudnn(data, weight, *how):
        kernel.relaid(gradient, layout)
        kernel.relaid(data, layout)
        kernel.steps += [RESULT] * (wanted[0] + wanted[1])
        kernel.give_back()
    else:
        if wanted[1]:
            data = kernel.relaid(data, layout)
        gradient = kernel.relaid(gradient, layout_of(data))
        if wanted[0]:
            with kernel.giving_back():
                kernel.steps.append(RESULT)
                kernel.relaid(weight, layout)
                works("data_gradient")
        if wanted[1]:
            kernel.steps.append(RESULT)
            works("weight_gradient")
        kernel.give_back()
    if wanted[2]:  # of the gradient as it was: PyTorch sums it up when cuDNN is done
        over = [0, *range(2, args[0].dim())]
        sums = reduction_scratch(torch.ops.aten.sum.dim_IntList, (args[0], over), {}, gpu)
        kernel.steps += ["reduction scratch", *sums]
    return kernel.steps


class _Kernel:
    """Collects the steps of a call."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._taken = 0
        self._alive: list[int] = []

    def take(self, name: str, size_bytes: int) -> None:
        """Take a piece, if it has any bytes."""
        if size_bytes:
            self.steps += [name, size_bytes]
            self._alive.append(self._taken)
            self._taken += 1

    def relaid(self, tensor: Tensor, layout: torch.memory_format) -> Tensor:
        """Take a copy in a layout, unless the tensor has it; return what has it."""
        if tensor.is_contiguous(memory_format=layout):
            return tensor
        self.take("contiguous", tensor.nbytes)
        return tensor.contiguous(memory_format=layout)

    @contextlib.contextmanager
    def giving_back(self) -> Iterator[None]:
        """Give back at the end of the block what it took."""
        before = len(self._alive)
        yield
        self.give_back(before)

    def give_back(self, since: int = 0) -> None:
        """Give back what is alive, but for the first pieces."""
        self.steps += [~piece for piece in self._alive[since:]]
        del self._alive[since:]


def cudnn_bytes(direction: Direction, layer: Convolution, dtype: torch.dtype, gpu: GpuSpec) -> int:
    """Return the bytes of cuDNN's workspace for one result of a convolution."""
    if gpu.compute_capability == _MEASURED:
        return workspace_bytes(direction, layer)
    return _least_bytes(direction, layer) if _converts(layer, dtype, gpu) else 0


def runs_without_cudnn(
    data: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    extra: Sequence[int],
    groups: int,
) -> bool:
    """Whether PyTorch runs its own kernel: for most depthwise convolutions in NCHW.

    cuDNN gets those in NHWC, and some in fp16 (`use_cudnn_depthwise` in
    `aten/src/ATen/native/Convolution.cpp`; of the sizes that it asks for, only the channels are).
    """
    channels = data.shape[1]
    return (
        channels == groups > 1
        and not transposed
        and layout_of(data, weight) is torch.contiguous_format
        and not (data.dtype is torch.float16 and channels >= 32 and stride[-1] == 1)
    )


def _layer(
    allows_tf32: bool,
    data: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    extra: Sequence[int],
    groups: int,
) -> Convolution | None:
    """Return the shapes of a convolution; None if cuDNN has no kernel for its dtype."""
    precision = _precision(data.dtype, allows_tf32)
    if precision is None or data.dim() != weight.dim():
        return None
    spatial = range(data.dim() - 2)
    strides, gaps, pads, more = (
        tuple(each) * (len(spatial) // len(each)) for each in (stride, dilation, padding, extra)
    )
    sides = [
        (data.shape[2 + i], weight.shape[2 + i], strides[i], gaps[i], pads[i], more[i])
        for i in spatial
    ]
    if transposed:
        written = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, d, p, e in sides]
        channels = weight.shape[1] * groups
    else:
        written = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, d, p, _ in sides]
        channels = weight.shape[0]
    return Convolution(
        data=tuple(data.shape),
        weight=tuple(weight.shape),
        output=(data.shape[0], channels, *written),
        precision=precision,
        channels_last=layout_of(data, weight) is not torch.contiguous_format,
        stride=strides,
        dilation=gaps,
        groups=groups,
        transposed=transposed,
    )


def _precision(dtype: torch.dtype, allows_tf32: bool) -> Precision | None:
    if dtype is torch.float32:
        return "tf32" if allows_tf32 else "fp32"
    return "half" if dtype in (torch.bfloat16, torch.float16) else None


def _least_bytes(direction: Direction, layer: Convolution) -> int:
    """Return the bytes of all tensors of a direction that is known to convert on any card."""
    # a transposed convolution runs the kernel of a data gradient, and its gradient a forward pass
    if direction == ("data_gradient" if layer.transposed else "forward"):
        return 0
    elements = sum(math.prod(shape) for shape in (layer.data, layer.weight, layer.output))
    return elements * layer.element_bytes


def _converts(layer: Convolution, dtype: torch.dtype, gpu: GpuSpec) -> bool:
    """Whether cuDNN is known to convert the layout of a convolution's tensors."""
    if layer.groups != 1 or layer.pointwise or layer.channels_last or layer.precision == "fp32":
        return False
    precision, since = _PRECISIONS[dtype]
    ordinary, on_tensor_cores = gpu.flops.get("fp32", 0), gpu.flops.get(precision, math.inf)
    return gpu.compute_capability >= since and on_tensor_cores > 2 * ordinary
