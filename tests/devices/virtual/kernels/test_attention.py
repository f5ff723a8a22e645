"""Attention runs as the target GPU would run it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from autobatch.devices import preserve
from autobatch.support.torch_private import attention_priorities
from tests.support.simulated import (
    WIDTH,
    ops,
    run,
)


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).unbind(2)
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)


@pytest.mark.parametrize(
    ("gpu", "autocast", "kernel"),
    [
        ("a100-40gb", "bf16", "flash"),
        ("a100-40gb", None, "efficient"),
        ("h100-80gb", "bf16", "cudnn"),
        ("t4", "fp16", "efficient"),
    ],
)
def test_attention_takes_the_kernel_of_the_target_gpu(gpu, autocast, kernel, monkeypatch):
    monkeypatch.setattr("autobatch.devices.virtual.kernels.attention._cudnn_version", lambda: 92000)
    trace = run(Attention(), gpu=gpu, autocast=autocast, sample=torch.zeros(2, 32, WIDTH))
    assert any(f"_scaled_dot_product_{kernel}_attention" in op for op in ops(trace))


FLASH, EFFICIENT, MATH, CUDNN = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
)


@pytest.mark.parametrize(
    ("backends", "in_order", "kernel"),
    [
        ([CUDNN], False, "cudnn"),
        ([CUDNN, FLASH], False, "flash"),
        ([CUDNN, FLASH], True, "cudnn"),
        ([MATH, FLASH], False, "flash"),
        ([EFFICIENT, FLASH], True, "efficient"),
    ],
)
def test_attention_takes_the_kernel_that_the_user_asks_for(backends, in_order, kernel):
    with sdpa_kernel(backends, set_priority=in_order):
        trace = run(Attention(), autocast="bf16", sample=torch.zeros(2, 32, WIDTH))
    assert any(f"_scaled_dot_product_{kernel}_attention" in op for op in ops(trace))


def test_the_order_of_the_card_in_the_machine_is_not_that_of_the_simulated_one(monkeypatch):
    monkeypatch.setattr(preserve, "_is_cuda_initialized", lambda: True)
    monkeypatch.setattr(preserve, "_real_capability", lambda: (9, 0))
    with sdpa_kernel([CUDNN, FLASH, EFFICIENT, MATH], set_priority=True):  # as a Hopper card does
        before = attention_priorities()
        trace = run(Attention(), autocast="bf16", sample=torch.zeros(2, 32, WIDTH))
        assert attention_priorities() == before
    assert any("_scaled_dot_product_flash_attention" in op for op in ops(trace))


class AsksForCudnn(Attention):
    def forward(self, x):
        with sdpa_kernel([CUDNN, FLASH, EFFICIENT, MATH], set_priority=True):
            return super().forward(x)


def test_what_a_model_asks_for_counts_on_a_machine_whose_card_has_the_same_order(monkeypatch):
    monkeypatch.setattr(preserve, "_is_cuda_initialized", lambda: True)
    monkeypatch.setattr(preserve, "_real_capability", lambda: (9, 0))
    trace = run(AsksForCudnn(), autocast="bf16", sample=torch.zeros(2, 32, WIDTH))
    assert any("_scaled_dot_product_cudnn_attention" in op for op in ops(trace))


def test_a_first_kernel_of_math_is_taken():
    with sdpa_kernel([MATH, FLASH], set_priority=True):
        trace = run(Attention(), autocast="bf16", sample=torch.zeros(2, 32, WIDTH))
    assert any("softmax" in op for op in ops(trace))


def test_attention_without_a_kernel_fails_as_on_the_card():
    with (
        sdpa_kernel([FLASH]),
        pytest.raises(Exception, match="No viable backend for scaled_dot_product_attention"),
    ):
        run(Attention(), sample=torch.zeros(2, 32, WIDTH))  # of float32


def test_multi_head_attention_reaches_the_fused_kernel():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, batch_first=True)
    trace = run(layer, autocast="bf16", sample=torch.zeros(2, 32, WIDTH))
    assert any("_scaled_dot_product_flash_attention" in op for op in ops(trace))


class CheckpointedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def noisy(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x + torch.randn(x.shape, device="cuda"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.noisy, x, use_reentrant=False)


def test_a_recomputed_forward_pass_takes_the_same_kernels():
    trace = run(CheckpointedAttention(), autocast="bf16", sample=torch.zeros(2, 32, WIDTH))
    flash = [b for b in trace.blocks if "_flash_attention" in b.op and b.phase == "backward"]
    assert any(block.op == "aten::_scaled_dot_product_flash_attention" for block in flash)


def test_a_dropout_of_zero_may_be_a_whole_number(monkeypatch):
    monkeypatch.setattr("autobatch.devices.virtual.kernels.attention._cudnn_version", lambda: 92000)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        q = model(batch).unflatten(-1, (4, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0).sum()

    sample = torch.zeros(2, 32, WIDTH)
    trace = run(nn.Linear(WIDTH, WIDTH), gpu="h100-80gb", autocast="bf16", sample=sample, loss=loss)
    assert any("_cudnn_attention" in op for op in ops(trace))
