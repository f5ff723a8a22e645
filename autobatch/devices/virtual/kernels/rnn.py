"""Recurrent layers as cuDNN runs them: one op for all layers and steps, not a cell at a time.

cuDNN saves what the backward pass needs in one buffer, its reserve, whose size has no published
formula. `forward_outputs` counts what a backward pass cannot do without: the activated gates of
every step, the cell states of an LSTM, and the outputs of every layer but the last.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.elements import set_placeholder

__all__ = ["LAYERS", "backward_outputs", "forward_outputs", "pack", "pad"]

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
    directions = 2 if both else 1
    stride = len(weights) // (layers * directions)
    projection = weights[-1].size(0) if stride in (3, 5) else 0
    hidden_size = cell.size(-1) if cell is not None else state.size(-1)
    output, last, last_cell, _, _ = aten._cudnn_rnn(
        data, weights, stride, None, state, cell, mode, hidden_size, projection, layers,
        batch_first, dropout, train, both, sizes, None,
    )  # fmt: skip
    return (output, last, last_cell) if mode == _LSTM else (output, last)


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
    return (
        mode.empty((*data.shape[:-1], width), data.dtype, data),
        mode.empty((*state.shape[:-1], projection or hidden_size), state.dtype, data),
        mode.empty(tuple(cell.shape) if cell is not None else empty, state.dtype, data),
        mode.empty((reserve,), torch.uint8, data),
        mode.empty(empty, data.dtype, data),
    )


def backward_outputs(mode: Any, *args: Any) -> tuple[Any, ...]:
    """Make what `_cudnn_rnn_backward` returns: gradients of input, states and weights."""
    data, weights, _, _, state, cell = args[:6]
    gradients = [
        None if like is None else mode.empty(tuple(like.shape), like.dtype, data)
        for like in (data, state, cell)
    ]
    return (*gradients, [mode.empty(tuple(w.shape), w.dtype, w) for w in weights])
