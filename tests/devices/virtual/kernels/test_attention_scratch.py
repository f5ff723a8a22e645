"""Attention takes the scratch that PyTorch's CUDA code takes on a simulated runtime."""

from __future__ import annotations

import pytest
import torch

from autobatch.devices.virtual.kernels.attention_scratch import attention_scratch
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.scratch import RESULT, RESULTS

aten = torch.ops.aten
A100, RTX_4090, T4 = map(find_gpu, ("a100-40gb", "rtx-4090", "t4"))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def tensor(batch, heads, length, width, dtype):
    """Make [B, H, S, D] over memory in the order of [B, S, H, D], as projections leave it."""
    made = torch.empty(batch, length, heads, width, dtype=dtype, device="meta")
    return made.transpose(1, 2)


def flash(batch, heads, groups, queries, keys, width, dropout=0.0, gpu=A100):
    query = tensor(batch, heads, queries, width, BF16)
    key = tensor(batch, groups, keys, width, BF16)
    forward = aten._scaled_dot_product_flash_attention.default
    backward = aten._scaled_dot_product_flash_attention_backward.default
    args = (query, key, key, dropout)
    return (
        list(attention_scratch(forward, args, {}, gpu)),
        list(attention_scratch(backward, (query, query, key, key, query), {}, gpu)),
    )


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        ((2, 12, 12, 1024, 1024, 64), [], [98304, 6291456]),
        ((2, 12, 12, 197, 197, 64), [], [24576, 1572864]),
        ((2, 12, 4, 512, 512, 64), [], [49152, 3145728, 1572864, 1572864]),
        ((2, 4, 4, 100, 300, 96), [9600, 921600], [4096, 393216]),
        ((2, 4, 4, 512, 512, 160), [49152, 9437184], [16384, 3145728]),
        ((2, 4, 4, 512, 512, 256), [49152, 12582912], [16384, 4194304]),
    ],
)
def test_flash_attention_splits_keys_and_sums_gradients_in_fp32(shape, forward, backward):
    assert flash(*shape) == (
        [RESULT, RESULT, *forward] if forward else [],
        [RESULTS, *backward],
    )


def test_flash_attention_with_dropout_keeps_its_seeds_and_splits_nothing():
    assert flash(2, 4, 4, 100, 300, 96, dropout=0.1)[0] == [RESULTS, 16]


def efficient(length, width, dtype, dropout=0.0, gpu=A100):
    query = tensor(1, 1, length, width, dtype)
    args = (query, query, query, query, None, query, None, None, None, dropout, [True] * 3)
    func = aten._scaled_dot_product_efficient_attention_backward.default
    steps = attention_scratch(func, args, {}, gpu)
    return [step for step in steps if isinstance(step, int) and step >= 0]


@pytest.mark.parametrize(
    ("gpu", "dtype", "dropout", "width", "length", "workspace"),
    [
        (A100, FP32, 0.0, 64, 512, 131200),
        (A100, FP32, 0.0, 72, 500, 262272),
        (A100, FP32, 0.1, 160, 197, 196704),
        (RTX_4090, FP32, 0.0, 72, 500, 262400),
        (T4, FP32, 0.0, 512, 197, 8 * 4 * 16400),
    ],
)
def test_efficient_attention_keeps_tiles_that_fit_the_card(
    gpu, dtype, dropout, width, length, workspace
):
    assert efficient(length, width, dtype, dropout, gpu)[-1] == workspace


def test_row_sums_are_made_apart_in_fp32_alone():
    assert len(efficient(512, 64, FP32)) == 3  # products, sums, workspace: one head needs no copy
    assert efficient(512, 64, BF16)[0] == 512 * 4
    assert len(efficient(512, 64, FP16)) == 2


def test_many_heads_share_the_200_parts_that_keys_are_split_into():
    query = tensor(32, 12, 512, 256, BF16)
    args = (query, query, query, query, None, query, None, None, None, 0.0, [True] * 3)
    func = aten._scaled_dot_product_efficient_attention_backward.default
    *_, workspace = attention_scratch(func, args, {}, A100)
    one_part = 64 * 2 * 256 + 4 * 4 * (4 + 128 * 64)
    assert workspace == 32 * 12 * one_part * 4


def test_cudnn_adds_gradients_of_queries_up_in_fp32():
    query = tensor(2, 12, 1024, 64, BF16)
    func = aten._scaled_dot_product_cudnn_attention_backward.default
    assert attention_scratch(func, (query, query), {}, find_gpu("h100-80gb")) == [RESULTS, 6389760]
