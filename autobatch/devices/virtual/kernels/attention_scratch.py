"""What CUDA's attention kernels allocate beside their results.

Flash attention splits the keys where there are too few queries to fill the card, and keeps a
partial output of each part; its backward pass adds the gradient of the queries up in fp32. From
`set_params_splitkv`, `mha_fwd` and `mha_bwd` in
`aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp`.

Memory-efficient attention keeps tiles of partial gradients, whose sizes follow from the kernel that
is taken: from `_efficient_attention_backward` in `attention_backward.cu` and `Params` in
`mem_eff_attention/kernel_backward.h`, both of `aten/src/ATen/native/transformers/cuda`. Kernels are
tried in the order of `generate_kernels.py` there, and one whose tiles do not fit into the card's
shared memory is passed over. Which ones do was seen in PyTorch's CUDA code on a simulated runtime,
for shared memories of 64, 99, 163 and 227 KiB.

The backward pass of cuDNN's attention adds the gradient of the queries up in fp32 and has a row sum
for each: the two buffers that cuDNN's frontend (compiled into PyTorch) puts into its workspace.
What cuDNN's engines add is not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels.sizes import ceil_div, round_up
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.scratch import RESULT, RESULTS, Step, Steps

__all__ = ["ATTENTION", "attention_scratch"]

aten = torch.ops.aten

_FLASH = aten._scaled_dot_product_flash_attention.default
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward.default
_EFFICIENT = aten._scaled_dot_product_efficient_attention.default
_EFFICIENT_BACKWARD = aten._scaled_dot_product_efficient_attention_backward.default
_CUDNN_BACKWARD = aten._scaled_dot_product_cudnn_attention_backward.default

ATTENTION = (_FLASH, _FLASH_BACKWARD, _EFFICIENT, _EFFICIENT_BACKWARD, _CUDNN_BACKWARD)
"""The ops that may take scratch."""

_FLOAT = 4
_PHILOX_BYTES = 16
_MOST_SPLITS = 128
_LARGE_BATCH = 2**16 - 1
"""Beyond this batch memory-efficient attention goes over the batch in parts."""


def attention_scratch(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec
) -> Steps:
    """Return what an attention kernel takes beside its results, in order.

    Args:
        func: one of `ATTENTION`.
        args: its arguments; tensors are [B, H, S, D].
        kwargs: its arguments by name.
        gpu: the card, whose multiprocessors and shared memory count.
    """
    if func is _FLASH:
        query, key, _, dropout = _first(args, kwargs, "query key value dropout_p", 0.0)
        return _flash(query, key, dropout or 0.0, gpu)
    if func is _FLASH_BACKWARD:
        return _flash_backward(args[0], args[1], args[2], args[4])
    if func is _EFFICIENT:
        return _efficient(args[0], args[2])
    if func is _EFFICIENT_BACKWARD:
        return _efficient_backward(args, gpu)
    query = args[1]
    return [RESULTS, query.numel() * _FLOAT + math.prod(query.shape[:-1]) * _FLOAT]


def _first(args: Sequence[Any], kwargs: Mapping[str, Any], names: str, default: Any) -> list[Any]:
    """Return arguments that may be given by name."""
    return [
        args[place] if place < len(args) else kwargs.get(name, default)
        for place, name in enumerate(names.split())
    ]


def _flash(query: Tensor, key: Tensor, dropout: float, gpu: GpuSpec) -> Steps:
    if dropout:
        return [RESULTS, _PHILOX_BYTES]
    batch, heads, length, width = query.shape
    block = 256 if width <= 64 else 128 if width <= 128 else 64
    tasks = batch * heads * ceil_div(length, 64)
    splits = _splits(tasks, 2 * gpu.multiprocessors, ceil_div(key.shape[2], block))
    rows = splits * batch * heads * length * _FLOAT
    return [RESULT, RESULT, rows, rows * _flash_width(width)] if splits > 1 else ()


def _splits(tasks: int, multiprocessors: int, blocks: int) -> int:
    """Return into how many parts the keys are split, by how evenly they fill the card."""
    if tasks >= 0.8 * multiprocessors:
        return 1
    choices = [
        splits
        for splits in range(1, min(_MOST_SPLITS, multiprocessors, blocks) + 1)
        if splits == 1 or ceil_div(blocks, splits) != ceil_div(blocks, splits - 1)
    ]

    def efficiency(splits: int) -> float:
        waves = tasks * splits / multiprocessors
        return waves / math.ceil(waves)

    best = max(map(efficiency, choices), default=1.0)
    return next((splits for splits in choices if efficiency(splits) >= 0.85 * best), 1)


def _flash_backward(gradient: Tensor, query: Tensor, key: Tensor, output: Tensor) -> Steps:
    batch, heads, length, width = query.shape
    rows = round_up(length, 128) * batch * heads * _FLOAT
    steps: list[Step] = [
        each.nbytes for each in (gradient, output) if not each.transpose(1, 2).is_contiguous()
    ]
    steps += [RESULTS, rows, rows * _flash_width(width)]
    if key.shape[1] != heads:  # every query's head has keys and values of its own
        steps += _of_each_head(key, key, heads)
    return steps


def _of_each_head(key: Tensor, value: Tensor, heads: int) -> list[Step]:
    """Return gradients of keys and values for every query's head, which are then added up."""
    return [each.nbytes // each.shape[1] * heads for each in (key, value)]


def _flash_width(width: int) -> int:
    return round_up(width, 32 if width <= 128 else 64)


def _efficient(query: Tensor, value: Tensor) -> Steps:
    """Return the output in fp32, which kernels of wide heads add up outside of registers."""
    wide = value.shape[-1]
    if query.element_size() == _FLOAT or max(query.shape[-1], wide) <= 128:
        return ()
    return [RESULTS, math.prod(query.shape[:-1]) * wide * _FLOAT]


@dataclass(frozen=True, slots=True)
class _Kernel:
    """Rows of queries and of keys in a tile; whether gradients of keys stay in registers."""

    queries: int
    keys: int
    in_registers: bool


def _efficient_backward(args: Sequence[Any], gpu: GpuSpec) -> Steps:
    gradient, query, key, value = args[:4]
    dropout = args[9]
    batch, heads, length, width = query.shape
    wide, keys = value.shape[-1], key.shape[2]
    if batch > _LARGE_BATCH or not query.numel() or not key.numel():
        return ()
    is_half = query.element_size() < _FLOAT
    kernel = _backward_kernel(max(width, wide), bool(dropout), is_half, gpu.compute_capability)
    rows = batch * heads * length * _FLOAT
    steps: list[Step] = []
    if not gradient.transpose(1, 2).is_contiguous():
        steps.append(gradient.nbytes)
    taken = len(steps)
    steps.append(RESULTS)
    if key.shape[1] != heads:
        steps += _of_each_head(key, value, heads)
        taken += 2
    if not is_half or (gpu.compute_capability < (7, 5) and not kernel.in_registers):
        steps += _row_sums(rows, rows * wide, is_half, heads > 1 and length > 1, taken)
    else:
        steps.append(rows)
    splits = ceil_div(keys, kernel.keys)
    if batch * heads >= 256 and keys <= 2 * kernel.keys:
        splits = 1
    kept = 0
    if is_half and not kernel.in_registers:
        splits = max(min(splits, 200 // (batch * heads)), 1)
        widths = round_up(width, kernel.queries) + round_up(wide, kernel.queries)
        kept = splits * kernel.keys * widths
    tile = 4 + kernel.queries * kernel.keys
    tiles = ceil_div(length, kernel.queries) * ceil_div(width, kernel.keys)
    return [*steps, batch * heads * round_up(kept + tiles * tile, 4) * _FLOAT]


def _row_sums(rows: int, products: int, is_half: bool, is_moved: bool, taken: int) -> list[Step]:
    """Return the row sums of gradient times output, which other kernels make first."""
    temporary = [*[products] * (2 * is_half), products, *[rows] * is_moved]
    return [*temporary, rows, *(~(taken + place) for place in range(len(temporary)))]


def _backward_kernel(
    width: int, dropout: bool, is_half: bool, capability: tuple[int, int]
) -> _Kernel:
    """Return the first kernel in PyTorch's order that takes such heads and fits the card."""
    has_large_memory = capability[0] in (9, 10) or capability in ((8, 0), (8, 7))
    if not is_half:
        return _Kernel(128 if has_large_memory and width > 64 else 64, 64, False)
    if width <= 64:
        return _Kernel(64, 64, True)
    if width > 128:
        return _Kernel(128, 64, False)
    if capability < (8, 0):
        return _Kernel(128, 64, True)
    if has_large_memory:
        return _Kernel(128, 128, True)
    has_narrow_kernel = width <= 96 and not dropout and capability in ((8, 6), (8, 9))
    return _Kernel(128, 64, True) if has_narrow_kernel else _Kernel(64, 64, False)
