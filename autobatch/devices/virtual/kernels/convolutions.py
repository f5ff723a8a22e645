"""Memory that cuDNN takes for convolutions while they run.

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

Results are in NHWC where the input or the weight is (`cudnn_conv_suggest_memory_format` in
`aten/src/ATen/native/ConvUtils.h`); PyTorch's own rule for tensors without data says so for CUDA's
device alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels.cudnn_sm90 import (
    Convolution,
    Direction,
    Precision,
    workspace_bytes,
)
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.scratch import RESULT, Step, Steps

__all__ = [
    "CONVOLUTION",
    "CONVOLUTION_BACKWARD",
    "convolution_settings",
    "convolution_workspaces",
    "is_channels_last",
    "relaid",
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


def convolution_workspaces(
    func: Any,
    args: Sequence[Any],
    gpu: GpuSpec,
    taken: int = 0,
    settings: Sequence[bool] | None = None,
) -> Steps:
    """Return the workspaces that a convolution takes, each for the kernel that makes one result.

    Args:
        func: the op; others than convolutions have none.
        args: its arguments.
        gpu: the card; without figures of its speed, it is taken for one with fast tensor cores.
        taken: pieces of scratch that the op has taken before.
        settings: as `convolution_settings` returns them; None for those of now.
    """
    is_on, allows_tf32 = convolution_settings() if settings is None else settings
    if not is_on or func not in (CONVOLUTION, CONVOLUTION_BACKWARD):
        return ()
    if func is CONVOLUTION:
        data, weight, _, *how = args
        directions: list[tuple[Direction, bool]] = [("forward", True)]
    else:
        _, data, weight, _, *how, wanted = args
        directions = [("data_gradient", wanted[0]), ("weight_gradient", wanted[1])]
    layer = _layer(allows_tf32, data, weight, *how[:6])
    if layer is None:
        return ()
    ask = workspace_bytes if gpu.compute_capability == _MEASURED else _least_bytes
    if ask is _least_bytes and not _converts(layer, data.dtype, gpu):
        return ()
    steps: list[Step] = []
    for direction, is_wanted in directions:
        if is_wanted:
            steps.append(RESULT)
            if size_bytes := ask(direction, layer):
                steps += [size_bytes, ~taken]
                taken += 1
    return steps


def relaid(func: Any, args: Sequence[Any], output: Any) -> Any:
    """Return the results of an op, those of a convolution in the layout that cuDNN gives them.

    >>> data = torch.empty(2, 8, 4, 4, device="meta").to(memory_format=torch.channels_last)
    >>> args = (data, torch.empty(16, 8, 1, 1, device="meta"), None, [1], [0], [1], False, [0], 1)
    >>> relaid(CONVOLUTION, args, torch.empty(2, 16, 4, 4, device="meta")).stride()
    (256, 1, 64, 16)
    """
    first = {CONVOLUTION: 0, CONVOLUTION_BACKWARD: 1}.get(func)
    if first is None or not any(map(is_channels_last, args[first : first + 2])):
        return output
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}[args[first].dim()]
    if isinstance(output, Tensor):
        return output.contiguous(memory_format=layout)
    *large, bias = output
    return (
        *(each if each is None else each.contiguous(memory_format=layout) for each in large),
        bias,
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
        channels_last=any(map(is_channels_last, (data, weight))),
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


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is in NHWC or NDHWC, and not in NCHW at the same time."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return (
        layout is not None
        and tensor.is_contiguous(memory_format=layout)
        and not tensor.is_contiguous()
    )
