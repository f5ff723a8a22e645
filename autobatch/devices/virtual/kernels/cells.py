"""Recurrent cells: what the fused kernels of `nn.LSTMCell` and `nn.GRUCell` allocate for a step.

From `aten/src/ATen/native/cuda/RNN.cu`. PyTorch has no shape rule for a GRU's cell, and one that
fails for an LSTM's without biases. Gradients of biases are sums over the samples, which may take
scratch (`reductions.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels.reductions import sum_over_rows
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.scratch import RESULT, RESULTS, Steps

__all__ = ["CELLS", "ORDERS", "OUTPUTS", "cell_scratch"]

aten = torch.ops.aten

_GRU_GATES, _GRU_SAVED = 3, 5
"""Per hidden unit and sample: gates, and numbers that the forward pass keeps for the backward."""


def _dense(mode: Any, like: Tensor, width: int | None = None) -> Any:
    """Make a contiguous tensor of the rows of another, of its width if none is given."""
    return mode.empty((like.shape[0], width or like.shape[1]), like.dtype, like)


def _lstm(mode: Any, gates: Tensor, _: Tensor, cell: Tensor, *biases: Any) -> tuple[Any, ...]:
    """Make the new hidden state, the new cell state, and what the backward pass needs."""
    return _dense(mode, cell), _dense(mode, cell), _dense(mode, gates)


def _lstm_backward(mode: Any, *args: Any) -> tuple[Any, ...]:
    """Make the gradients of the gates, of the cell state, and of both biases: None without."""
    _, _, cell, _, saved, has_bias = args
    bias = mode.empty((saved.shape[1],), saved.dtype, saved) if has_bias else None
    return _dense(mode, saved), _dense(mode, cell), bias


def _gru(mode: Any, gates: Tensor, _: Tensor, hidden: Tensor, *biases: Any) -> tuple[Any, Any]:
    """Make the new hidden state, and what the backward pass needs."""
    return _dense(mode, hidden), _dense(mode, hidden, _GRU_SAVED * hidden.shape[1])


def _gru_backward(mode: Any, gradient: Tensor, saved: Tensor, has_bias: bool) -> tuple[Any, ...]:
    """Make the gradients of both gates, of the hidden state, and of the biases if there are any."""
    width = _GRU_GATES * gradient.shape[1]
    gates = [_dense(mode, saved, width) for _ in range(2)]
    biases = [mode.empty((width,), saved.dtype, saved) if has_bias else None for _ in range(2)]
    return (*gates, _dense(mode, gradient), *biases)


OUTPUTS = {
    aten._thnn_fused_lstm_cell.default: _lstm,
    aten._thnn_fused_lstm_cell_backward_impl.default: _lstm_backward,
    aten._thnn_fused_gru_cell.default: _gru,
    aten._thnn_fused_gru_cell_backward.default: _gru_backward,
}
"""By op, what makes its results."""

ORDERS = {aten._thnn_fused_gru_cell.default: (1, 0), aten._thnn_fused_lstm_cell.default: (2, 0, 1)}
"""By op, the places of its results in the order of allocation: what is saved comes first."""

_GRU_BACKWARD = aten._thnn_fused_gru_cell_backward.default

CELLS = (_GRU_BACKWARD, aten._thnn_fused_lstm_cell_backward_impl.default)
"""The ops that may take scratch."""


def cell_scratch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec) -> Steps:
    """Return what the gradients of a cell's biases take beside themselves.

    Args:
        func: one of `CELLS`.
        args: its arguments; the last two are what the forward pass kept, and whether there are
            biases.
        kwargs: its arguments by name.
        gpu: the card, whose multiprocessors decide how often a sum is split.
    """
    saved, has_bias = args[-2:]
    if not has_bias:
        return ()
    samples, width = saved.shape
    if func is not _GRU_BACKWARD:  # one sum serves both biases
        return [RESULTS, *sum_over_rows(samples, width, saved.dtype, gpu)]
    taken = sum_over_rows(samples, width // _GRU_SAVED * _GRU_GATES, saved.dtype, gpu)
    given_back = [~piece for piece in range(len(taken))]
    return [*[RESULT] * 4, *taken, *given_back, RESULTS, *taken]
