"""Recurrent layers as cuDNN runs them: one op for all layers and steps, not a cell at a time.

Weights and their gradients lie in one buffer each, steps come before samples, and under autocast
weights are cast into a buffer of their own (`aten/src/ATen/native/cudnn/RNN.cpp`, `autocast_mode.h`
beside `_cudnn_rnn_cast_reflatten`).

cuDNN saves what the backward pass needs in one buffer, its reserve, whose size has no published
formula. `forward_outputs` counts what a backward pass cannot do without: the activated gates of
every step, the cell states of an LSTM, and the outputs of every layer but the last.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.devices.virtual.elements import set_placeholder
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.scratch import RESULT, RESULTS, Steps
from autobatch.support.torch_private import FakeTensor

__all__ = [
    "BACKWARD",
    "FORWARD",
    "LAYERS",
    "backward_outputs",
    "flatten_layer",
    "flatten_weights",
    "forward_outputs",
    "has_weights_on",
    "pack",
    "pad",
    "scratch",
]

aten = torch.ops.aten

_MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}
"""cuDNN's mode number by the name of PyTorch's function."""

_LSTM = _MODES["lstm"]
_GATES = (1, 1, 4, 4)  # kept per hidden unit; a GRU keeps its recurrent candidate beside 3 gates


def _run_layer(mode: int, *args: Any) -> Any:
    """Run `_cudnn_rnn` on the arguments of the dense or of the packed form of those functions."""
    if isinstance(args[3], (list, tuple)):  # packed: the fourth is the list of weights
        data, batch_sizes, hidden, weights, biases, layers, dropout, train, both = args
        batch_first, sizes = False, [1] * len(batch_sizes)
        sizes[0] = hidden[0].size(1) if mode == _LSTM else hidden.size(1)
    else:
        data, hidden, weights, biases, layers, dropout, train, both, batch_first = args
        sizes = []
    state, cell = hidden if mode == _LSTM else (hidden, None)
    if torch.is_autocast_enabled(data.device.type):
        dtype = torch.float16  # whatever dtype autocast has
        if weights[0].dtype is not dtype:
            weights = list(_CastIntoOne.apply(dtype, *weights))
        cell = cell if cell is None else cell.to(dtype)
        state, data = state.to(dtype), data.to(dtype)
    directions = 2 if both else 1
    stride = len(weights) // (layers * directions)
    projection = weights[-1].size(0) if stride in (3, 5) else 0
    hidden_size = cell.size(-1) if cell is not None else state.size(-1)
    output, last, last_cell, _, _ = aten._cudnn_rnn(
        data, weights, stride, None, state, cell, mode, hidden_size, projection, layers,
        batch_first, dropout, train, both, sizes, None,
    )  # fmt: skip
    return (output, last, last_cell) if mode == _LSTM else (output, last)


class _CastIntoOne(torch.autograd.Function):
    """Casts weights into one buffer, and their gradients back one by one."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [weight.dtype for weight in weights]
        whole = sum(weight.numel() for weight in weights)
        buffer = torch.zeros(whole, dtype=dtype, device=weights[0].device)
        return tuple(_parts(buffer, weights))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        pairs = reversed([*zip(gradients, ctx.dtypes, strict=True)])
        cast = [None if gradient is None else gradient.to(dtype) for gradient, dtype in pairs]
        return (None, *reversed(cast))


def _parts(buffer: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a buffer, one after the other, each of the shape of a weight."""
    sizes = [weight.numel() for weight in weights]
    parts = buffer.split(sizes)
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def flatten_weights(model: nn.Module, device: torch.device) -> None:
    """Put the weights of every recurrent layer on a device into one buffer, as `cuda()` does.

    Those that lie in one already stay there.
    """
    for layer in model.modules():
        if isinstance(layer, nn.RNNBase) and has_weights_on(device, layer):
            storages = {weight.untyped_storage()._cdata for weight in _weights_of(layer)}
            if len(storages) > 1:
                flatten_layer(layer)


def flatten_layer(layer: nn.RNNBase) -> Tensor | None:
    """Do what `flatten_parameters` does on a card: copy a layer's weights into a new buffer.

    The weights then are views of it, and their memory is free unless something else holds it. Like
    PyTorch's, this makes a buffer whenever it is called, and leaves weights where they are that are
    tied, of several dtypes, or of one that cuDNN does not take.

    Returns:
        The buffer, or None where the weights stay where they are.
    """
    weights = _weights_of(layer)
    is_whole = len({id(weight) for weight in weights}) == len(layer._flat_weights_names)
    dtypes = {weight.dtype for weight in weights}
    if not torch.backends.cudnn.enabled or not is_whole or len(dtypes) > 1:
        return None
    if not dtypes <= torch.backends.cudnn.CUDNN_TENSOR_DTYPES:
        return None
    with torch.no_grad():
        buffer = weights[0].new_zeros(sum(weight.numel() for weight in weights))
        for weight, part in zip(weights, _parts(buffer, weights), strict=True):
            weight.data = part
    return buffer


def has_weights_on(device: torch.device, layer: nn.RNNBase) -> bool:
    """Whether all weights of a recurrent layer are on a device."""
    weights = _weights_of(layer)
    return bool(weights) and all(_is_on(device, weight.data) for weight in weights)


def _weights_of(layer: nn.RNNBase) -> list[Tensor]:
    return [weight for weight in layer._flat_weights if isinstance(weight, Tensor)]


def _is_on(device: torch.device, tensor: Any) -> bool:
    return type(tensor) is FakeTensor and tensor.fake_device == device


LAYERS = {name: functools.partial(_run_layer, mode) for name, mode in _MODES.items()}
"""The cuDNN forms of `torch.lstm`, `torch.gru`, `torch.rnn_tanh` and `torch.rnn_relu`, by name."""


def pack(data: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Pack sequences as if all had full length: the upper bound."""
    steps_first = data.transpose(0, 1) if batch_first else data
    steps, samples = steps_first.shape[:2]
    sizes = torch.full((steps,), samples, device="cpu")
    set_placeholder(sizes, samples)
    return steps_first.flatten(0, 1).clone(), sizes


def pad(data: Tensor, sizes: Tensor, batch_first: bool, *rest: Any) -> tuple[Tensor, Tensor]:
    """Undo `pack`."""
    steps = sizes.numel()
    padded = data.unflatten(0, (steps, -1)).clone()
    lengths = torch.full((padded.size(1),), steps, device="cpu")
    return (padded.transpose(0, 1) if batch_first else padded), lengths


def forward_outputs(mode: Any, *args: Any) -> tuple[Tensor, ...]:
    """Make what `_cudnn_rnn` returns: output, last states, reserve, weight buffer."""
    (data, weights, _, _, state, cell, kind, hidden_size, projection, layers, batch_first, _,
     train, both, sizes, _) = args  # fmt: skip
    directions = 2 if both else 1
    width = (projection or hidden_size) * directions
    steps = data.numel() // data.size(-1)
    cells = hidden_size if kind == _LSTM else 0
    per_step = layers * directions * (_GATES[kind] * hidden_size + cells) + (layers - 1) * width
    reserve = steps * per_step * data.element_size() if train else 0
    empty = (0,)
    shape = (*data.shape[:-1], width)
    like = mode.empty(empty, data.dtype, data)
    if batch_first:
        samples, length = data.shape[:2]
        output = mode.strided(like, shape, (width, samples * width, 1))
    else:
        output = mode.empty(shape, data.dtype, data)
    return (
        output,
        mode.empty((*state.shape[:-1], projection or hidden_size), state.dtype, data),
        mode.empty(tuple(cell.shape) if cell is not None else empty, state.dtype, data),
        mode.empty((reserve,), torch.uint8, data),
        mode.empty(empty, data.dtype, data),
    )


def backward_outputs(mode: Any, *args: Any) -> tuple[Any, ...]:
    """Make what `_cudnn_rnn_backward` returns: gradients of input, states and weights.

    Those of the weights are parts of one buffer.
    """
    data, weights, _, _, state, cell = args[:6]
    batch_first = args[14]
    gradient: Any = mode.empty(tuple(data.shape), data.dtype, data)
    if batch_first:
        samples, length, width = data.shape
        gradient = mode.strided(gradient, tuple(data.shape), (width, samples * width, 1))
    states = [
        None if like is None else mode.empty(tuple(like.shape), like.dtype, data)
        for like in (state, cell)
    ]
    buffer = mode.empty((sum(w.numel() for w in weights),), weights[0].dtype, weights[0])
    offset, parts = 0, []
    for weight in weights:
        parts.append(mode.part(buffer, tuple(weight.shape), offset))
        offset += weight.numel()
    return (gradient, *states, parts)


def scratch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec) -> Steps:
    """Return what a recurrent layer takes beside its results.

    Args:
        func: `_cudnn_rnn` or its backward.
        args: its arguments.
        kwargs: its arguments by name.
        gpu: the card; none of it depends on that.
    """
    data = args[0]
    if func is FORWARD:
        return _turned(data, args[10])
    state, cell, gradient, *of_states = args[4], args[5], args[7], args[8], args[9]
    batch_first = args[14]
    missing = [
        like.nbytes
        for like, given in zip((state, cell), of_states, strict=True)
        if like is not None and given is None
    ]
    turned = _turned(data, batch_first)
    copies = [*turned, *(_turned(gradient, batch_first) if gradient is not None else [])]
    first = len(missing)
    results = [RESULT] * (2 + (cell is not None))
    freed = [~(first + place) for place in range(len(copies))]
    return [*missing, *copies, *results, *freed, *turned, RESULTS]


def _turned(tensor: Tensor, batch_first: bool) -> list[int]:
    """Return the copy of a tensor that has samples before steps."""
    is_copied = not (tensor.transpose(0, 1) if batch_first else tensor).is_contiguous()
    return [tensor.nbytes] * is_copied


FORWARD, BACKWARD = aten._cudnn_rnn.default, aten._cudnn_rnn_backward.default
