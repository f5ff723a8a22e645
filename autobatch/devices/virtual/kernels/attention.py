"""Scaled dot-product attention as the target GPU would run it.

PyTorch chooses an attention kernel by the card's compute capability, the dtype, the head size,
the mask and the dropout; what is saved for backward differs by gigabytes between them. The rules
restate `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` (`priority_order` and the
`can_use_*` filters for dense tensors); the user's switches count
(`torch.backends.cuda.enable_*_sdp`, `torch.nn.attention.sdpa_kernel`, which also sets an order).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from autobatch.devices.virtual.autocast import inside_an_op
from autobatch.support.torch_private import (
    attention_priorities,
    cudnn_bindings,
    torch_version,
)

__all__ = ["attend"]

aten = torch.ops.aten

_HALVES = (torch.float16, torch.bfloat16)
_GROUPS_SINCE = (2, 14)
"""The first PyTorch whose memory-efficient attention takes fewer heads of keys than of queries, and
whose fused kernels take a single one without being told (pull request 191085)."""

_CUDNN_PREFERRED_ABOVE = 91500
_ASSUMED_CUDNN = 91900  # of current wheels; a build without cuDNN cannot say which one

_FLASH, _EFFICIENT, _MATH, _CUDNN = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
)
_USUAL_ORDER = [_FLASH, _EFFICIENT, _MATH, _CUDNN]
_CUDNN_FIRST = [_CUDNN, _FLASH, _EFFICIENT, _MATH]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What the choice of a kernel depends on; tensors are [B, H, S, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    is_causal: bool
    has_groups: bool
    may_group: bool
    needs_grad: bool
    capability: tuple[int, int]


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
    if attn_mask is not None:  # arguments are cast from right to left, as in `autocast.py`
        attn_mask = _autocast(attn_mask)
    value, key, query = (_autocast(tensor) for tensor in (value, key, query))
    with inside_an_op():
        return _attended(
            capability, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )


def _attended(
    capability: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Any:
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.where(
            attn_mask,
            torch.scalar_tensor(0.0, dtype=query.dtype, device=query.device),
            torch.scalar_tensor(-math.inf, dtype=query.dtype, device=query.device),
        )
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    call = _Call(
        query=query,
        key=key,
        value=value,
        mask=attn_mask,
        dropout=float(dropout_p),
        is_causal=is_causal,
        has_groups=query.dim() == 4 and query.size(-3) != key.size(-3),
        may_group=enable_gqa or (key.size(-3) == 1 and torch_version() >= _GROUPS_SINCE),
        needs_grad=needs_grad,
        capability=capability,
    )
    kernel = _kernel(call)
    if kernel == _CUDNN:
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, attn_mask, needs_grad, dropout_p, is_causal, False, scale=scale
        )[0]
    if kernel == _FLASH:
        head = query.size(-1)
        padded = [F.pad(t, (0, -head % 8)) if head % 8 else t for t in (query, key, value)]
        output = aten._scaled_dot_product_flash_attention(
            *padded, dropout_p, is_causal, False, scale=scale or 1 / math.sqrt(head)
        )[0]
        return output[..., :head] if head % 8 else output
    if kernel == _EFFICIENT:
        bias = None if attn_mask is None else _aligned_bias(attn_mask, query, key)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, needs_grad, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.is_floating_point():
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _cudnn_version() -> int:
    bindings = cudnn_bindings()
    return bindings.getVersionInt() if bindings is not None else _ASSUMED_CUDNN


def _kernel(call: _Call) -> SDPBackend:
    """Return the kernel that CUDA would take: the first by priority that can.

    Raises:
        RuntimeError: The user switched off every kernel that can, as on the card.
    """
    for kernel in _order(call):
        is_enabled, can = _CHOICES[kernel]
        if is_enabled() and can(call):
            return kernel
    raise RuntimeError("No viable backend for scaled_dot_product_attention was found.")


def _order(call: _Call) -> list[SDPBackend]:
    """Return the kernels by priority: the user's order, or PyTorch's for the card."""
    order = [SDPBackend(value) for value in attention_priorities()]
    order = [kernel for kernel in order if kernel in _USUAL_ORDER]
    if order == _USUAL_ORDER:
        prefers_cudnn = (
            _cudnn_version() > _CUDNN_PREFERRED_ABOVE
            and call.capability[0] in (9, 10)
            and os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") != "1"
        )
        return _CUDNN_FIRST if prefers_cudnn else _USUAL_ORDER
    return order


def _is_fused(call: _Call) -> bool:
    """Whether the shapes are those of a fused kernel."""
    tensors = (call.query, call.key, call.value)
    return all(tensor.dim() == 4 for tensor in tensors) and (call.may_group or not call.has_groups)


def _has_whole_rows(call: _Call) -> bool:
    return all(tensor.stride(-1) == 1 for tensor in (call.query, call.key, call.value))


def _cudnn_can(call: _Call) -> bool:
    """Whether cuDNN's kernel takes these tensors."""
    if not _is_fused(call):
        return False
    version = _cudnn_version()
    query, head, value_head = call.query, call.query.size(-1), call.value.size(-1)
    widest = max(head, value_head)
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    return (
        (8, 0) <= call.capability <= (12, 1)
        and query.dtype in _HALVES
        and not (is_deterministic and not torch.is_deterministic_algorithms_warn_only_enabled())
        and not (call.mask is not None and call.mask.requires_grad)
        and (call.dropout * 16).is_integer()
        and widest <= (256 if version > 92200 else 128)
        and (widest <= 128 or (head, value_head) in ((192, 128), (256, 256)))
        and head % 8 == 0
        and value_head % 8 == 0
        and call.key.size(-2) != 1
        and not (call.dropout and query.size(-2) == 1)
        and max(query.size(0), query.size(1)) <= 65535
    )


def _flash_can(call: _Call) -> bool:
    if not _is_fused(call):
        return False
    query, head = call.query, call.query.size(-1)
    has_small_sm = (8, 6) <= call.capability <= (8, 9) or call.capability[0] == 12
    backward_can = head <= 192 or (head > 224 and not call.dropout)
    return (
        call.mask is None
        and _has_whole_rows(call)
        and query.dtype in _HALVES
        and call.capability >= (8, 0)
        and head == call.key.size(-1) == call.value.size(-1)
        and head <= 256
        and not (call.is_causal and query.size(-2) != call.key.size(-2))
        and (backward_can or not (call.needs_grad and has_small_sm))
    )


def _efficient_can(call: _Call) -> bool:
    if not _is_fused(call):
        return False
    query, mask = call.query, call.mask
    half = query.dtype in _HALVES
    tensor_cores = call.capability[0] >= 8 or (call.capability[0] == 7 and half)
    alignment = max(4 if call.capability[0] >= 8 else 1, (8 if half else 4) if tensor_cores else 1)
    return (
        _has_whole_rows(call)
        and (half or query.dtype is torch.float32)
        and (query.dtype is not torch.bfloat16 or call.capability >= (8, 0))
        and call.capability >= (5, 0)
        and not (call.has_groups and torch_version() < _GROUPS_SINCE)
        and query.size(-1) == call.key.size(-1)
        and query.size(-1) % alignment == 0
        and call.value.size(-1) % alignment == 0
        and (mask is None or mask.stride(-1) == 1 or mask.size(-1) == 1)
    )


_CHOICES: dict[SDPBackend, tuple[Callable[[], bool], Callable[[_Call], bool]]] = {
    _CUDNN: (torch.backends.cuda.cudnn_sdp_enabled, _cudnn_can),
    _FLASH: (torch.backends.cuda.flash_sdp_enabled, _flash_can),
    _EFFICIENT: (torch.backends.cuda.mem_efficient_sdp_enabled, _efficient_can),
    _MATH: (torch.backends.cuda.math_sdp_enabled, lambda _: True),
}
"""Whether the user allows a kernel, and whether it takes a call's tensors."""


def _aligned_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Expand a mask to [B, H, S_q, S_k] over storage whose rows are multiples of 8 elements."""
    length = mask.size(-1)
    if length % 8:
        mask = F.pad(mask, (0, -length % 8))[..., :length]
    return mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))
