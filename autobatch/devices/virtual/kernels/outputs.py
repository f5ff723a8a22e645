"""Results of ops whose CUDA kernels return other tensors than PyTorch's own rules say.

Some results have other shapes on CUDA: statistics of half-precision inputs are fp32, and there are
none in evaluation mode (`aten/src/ATen/native/cuda/Normalization.cu`). Other ops have a kernel for
CUDA beside one made of other ops (`CompositeImplicitAutograd`). A device without a kernel of its
own runs the second one, whose intermediate results CUDA never allocates: seven tensors for one
backward pass of SiLU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels import cells, columns, losses, rnn
from autobatch.devices.virtual.kernels.memory_formats import layout_of
from autobatch.devices.virtual.kernels.norms import runs_on_cudnn
from autobatch.devices.virtual.kernels.sizes import round_up

__all__ = ["BY_LAYOUT", "FUSED", "RULES", "register"]

aten = torch.ops.aten

FUSED = ("silu_backward", "silu_backward.grad_input", "mish_backward", "_fused_rms_norm")
"""Ops that CUDA runs as one kernel, and PyTorch takes apart on a device that it does not know."""

_libraries: list[Any] = []  # a Library unregisters its kernels when it is collected


def register() -> None:
    """Tell the dispatcher that the virtual device has the fused kernels; once per process."""
    kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")
    _libraries.append(kernels)
    for name in FUSED:
        if hasattr(aten, name.partition(".")[0]):  # not in every version
            kernels.impl(name, _never)


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("fake tensors are answered before any kernel runs")


def _log_sigmoid(mode: Any, data: Tensor) -> tuple[Any, Any]:
    """Make the output, and the buffer that CUDA's kernel leaves empty and the CPU's does not."""
    return mode.empty_like(data), mode.empty((0,), data.dtype, data)


def _batch_norm(mode: Any, *args: Any) -> tuple[Any, Any, Any]:
    """Make the output, the saved mean and the saved inverse deviation."""
    data, weight, _, _, _, training, _, _ = args
    half = data.dtype in (torch.float16, torch.bfloat16)
    statistics = (data.shape[1] if training else 0,), torch.float32 if half else data.dtype, data
    return _normalized(mode, data, weight), mode.empty(*statistics), mode.empty(*statistics)


def _normalized(mode: Any, data: Tensor, weight: Tensor | None) -> Any:
    """Make a tensor like `data`, and without gaps if cuDNN makes it."""
    return _dense(mode, data) if runs_on_cudnn(data, weight) else mode.empty_like(data)


def _dense(mode: Any, data: Tensor) -> Any:
    """Make a tensor without gaps, in NHWC or NDHWC if `data` is."""
    layout = torch.empty(data.shape, device="meta", memory_format=layout_of(data))
    return mode.strided(data, tuple(data.shape), layout.stride())


def _batch_norm_backward(
    mode: Any, gradient: Tensor, data: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Any, Any, Any]:
    """Make the gradients of data, weight and bias that the last argument asks for."""
    channels, wants = (data.shape[1],), rest[-1]
    dtype = data.dtype if weight is None else weight.dtype
    return (
        _dense(mode, data) if wants[0] else None,
        mode.empty(channels, dtype, data) if wants[1] else None,
        mode.empty(channels, dtype, data) if wants[2] else None,
    )


def _layer_norm_backward(mode: Any, *args: Any) -> tuple[Any, ...]:
    """Make the gradients of data, weight and bias: contiguous, whatever the input was."""
    _, data, _, _, _, weight, bias, wants = args
    return tuple(
        mode.empty(tuple(tensor.shape), tensor.dtype, tensor)
        if wanted and tensor is not None
        else None
        for tensor, wanted in zip((data, weight, bias), wants, strict=True)
    )


def _ctc_loss(mode: Any, log_probs: Tensor, targets: Tensor, *lengths: Any) -> tuple[Any, Any]:
    """Make the losses and the table of `alpha`, for targets of full length."""
    steps, samples = log_probs.shape[:2]
    longest = targets.shape[1] if targets.dim() == 2 else targets.numel() // max(samples, 1)
    return (
        mode.empty((samples,), log_probs.dtype, log_probs),
        mode.empty((samples, steps, 2 * longest + 1), log_probs.dtype, log_probs),
    )


def _grouped_mm(mode: Any, first: Tensor, second: Tensor, *rest: Any) -> Tensor:
    """Multiply groups of rows by a matrix each, in any dtype, as experts of a model do.

    PyTorch's rule for tensors without data refuses fp32, which the kernel takes
    (`create_grouped_gemm_output_tensor` in `ATen/native/GroupedMMUtils.h`): rows of the result
    begin at multiples of 16 bytes.
    """
    offsets = rest[0] if rest else None
    rows, columns = first.shape[-2], second.shape[-1]
    shape: tuple[int, ...] = (rows, columns)
    if first.dim() == second.dim():
        groups = first.shape[0] if first.dim() == 3 or offsets is None else offsets.shape[0]
        shape = (groups, rows, columns)
    aligned = 16 // first.element_size()
    padded = round_up(columns, aligned)
    stride = (padded, 1) if len(shape) == 2 else (rows * padded, padded, 1)
    made: Tensor = mode.strided(first, shape, stride)
    return made


RULES: dict[Any, Callable[..., Any]] = {
    **cells.OUTPUTS,
    **columns.OUTPUTS,
    **losses.OUTPUTS,
    aten.log_sigmoid_forward.default: _log_sigmoid,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten._ctc_loss.default: _ctc_loss,
    aten._ctc_loss.Tensor: _ctc_loss,
    aten._grouped_mm.default: _grouped_mm,
    aten._cudnn_rnn.default: rnn.forward_outputs,
    aten._cudnn_rnn_backward.default: rnn.backward_outputs,
}
"""By op, what makes its results from the mode and the op's arguments, or NotImplemented."""

BY_LAYOUT = frozenset(
    (
        aten.log_sigmoid_forward.default,
        aten.native_layer_norm_backward.default,
        aten.native_batch_norm.default,
        aten.native_batch_norm_backward.default,
    )
)
"""The ops whose results depend on nothing but the layouts of their arguments."""
