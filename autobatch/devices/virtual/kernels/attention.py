"""Scaled dot-product attention as the target GPU would run it.

PyTorch chooses an attention kernel by the card's compute capability, the dtype, the head size,
the mask and the dropout; what is saved for backward differs by gigabytes between them. The rules
restate `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` (`priority_order` and the
`can_use_*` filters for dense tensors); user switches (`torch.backends.cuda.enable_*_sdp`) count.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from autobatch.support.torch_private import cudnn_bindings

__all__ = ["attend", "choose_backend"]

aten = torch.ops.aten

Backend = Literal["cudnn", "flash", "efficient", "math"]
_HALVES = (torch.float16, torch.bfloat16)
_CUDNN_PREFERRED_ABOVE = 91500
_ASSUMED_CUDNN = 91900  # of current wheels; a build without cuDNN cannot say which one


def choose_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    causal: bool,
    grouped: bool,
    needs_grad: bool,
    capability: tuple[int, int],
) -> Backend:
    """Return the kernel that CUDA would take for dense [B, H, S, D] inputs."""
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return "math"
    cudnn_first = _cudnn_version() > _CUDNN_PREFERRED_ABOVE and capability[0] in (9, 10)
    if (
        cudnn_first
        and torch.backends.cuda.cudnn_sdp_enabled()
        and _cudnn_can(query, key, value, dropout, capability)
    ):
        return "cudnn"
    if not _last_strides_are_one(query, key, value):
        return "math"
    if (
        torch.backends.cuda.flash_sdp_enabled()
        and mask is None
        and _flash_can(query, key, value, dropout, causal, needs_grad, capability)
    ):
        return "flash"
    if torch.backends.cuda.mem_efficient_sdp_enabled() and _efficient_can(
        query, key, value, mask, grouped, capability
    ):
        return "efficient"
    return "math"


def attend(
    capability: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Run attention through the aten op of the kernel that CUDA would take."""
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(query.dtype)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    backend = choose_backend(
        query,
        key,
        value,
        attn_mask,
        dropout=dropout_p,
        causal=is_causal,
        grouped=enable_gqa and query.size(-3) != key.size(-3),
        needs_grad=needs_grad,
        capability=capability,
    )
    if backend == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, attn_mask, needs_grad, dropout_p, is_causal, False, scale=scale
        )[0]
    if backend == "flash":
        head = query.size(-1)
        padded = [F.pad(t, (0, -head % 8)) if head % 8 else t for t in (query, key, value)]
        output = aten._scaled_dot_product_flash_attention(
            *padded, dropout_p, is_causal, False, scale=scale or 1 / math.sqrt(head)
        )[0]
        return output[..., :head] if head % 8 else output
    if backend == "efficient":
        bias = None if attn_mask is None else _aligned_bias(attn_mask, query, key)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, needs_grad, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _cudnn_version() -> int:
    bindings = cudnn_bindings()
    return bindings.getVersionInt() if bindings is not None else _ASSUMED_CUDNN


def _autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.is_floating_point():
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _last_strides_are_one(*tensors: Tensor) -> bool:
    return all(tensor.stride(-1) == 1 for tensor in tensors)


def _cudnn_can(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, capability: tuple[int, int]
) -> bool:
    head, value_head = query.size(-1), value.size(-1)
    limit = 256 if _cudnn_version() > 92200 and capability[0] in (9, 10) else 128
    return (
        query.dtype in _HALVES
        and capability >= (8, 0)
        and (dropout * 16).is_integer()
        and max(head, value_head) <= limit
        and (max(head, value_head) <= 128 or (head, value_head) in ((192, 128), (256, 256)))
        and head % 8 == 0
        and value_head % 8 == 0
        and key.size(-2) != 1
        and not (dropout and query.size(-2) == 1)
        and max(query.size(0), query.size(1)) <= 65535
    )


def _flash_can(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    causal: bool,
    needs_grad: bool,
    capability: tuple[int, int],
) -> bool:
    head = query.size(-1)
    small_sm = (8, 6) <= capability <= (8, 9) or capability[0] == 12
    backward_can = not (needs_grad and small_sm) or head <= 192 or (head > 224 and not dropout)
    return (
        query.dtype in _HALVES
        and capability >= (8, 0)
        and head == key.size(-1) == value.size(-1)
        and head <= 256
        and not (causal and query.size(-2) != key.size(-2))
        and backward_can
    )


def _efficient_can(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    grouped: bool,
    capability: tuple[int, int],
) -> bool:
    half = query.dtype in _HALVES
    if not (half or query.dtype is torch.float32):
        return False
    if query.dtype is torch.bfloat16 and capability < (8, 0):
        return False
    tensor_cores = capability[0] >= 8 or (capability[0] == 7 and half)
    alignment = max(4 if capability[0] >= 8 else 1, (8 if half else 4) if tensor_cores else 1)
    return (
        capability >= (5, 0)
        and not grouped
        and query.size(-1) == key.size(-1)
        and query.size(-1) % alignment == 0
        and value.size(-1) % alignment == 0
        and (mask is None or mask.stride(-1) == 1 or mask.size(-1) == 1)
    )


def _aligned_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Expand a mask to [B, H, S_q, S_k] over storage whose rows are multiples of 16 elements."""
    length = mask.size(-1)
    if length % 16:
        mask = F.pad(mask, (0, -length % 16))[..., :length]
    return mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))
