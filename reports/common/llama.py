"""A Llama as torchtitan trains it, written anew from its published shapes and semantics.

Master weights in fp32, sharded block by block with FSDP2 (computing in bf16, reducing in fp32),
causal attention in one kernel, rotary positions as complex numbers, layers recomputed by
non-reentrant checkpoints, cross entropy on logits in fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)


class Attention(nn.Module):
    """Grouped-query attention; keys and values are repeated for their queries."""

    def __init__(self, width: int, heads: int, groups: int):
        super().__init__()
        self.size = width // heads
        self.repeats = heads // groups
        self.wq = nn.Linear(width, heads * self.size, bias=False)
        self.wk = nn.Linear(width, groups * self.size, bias=False)
        self.wv = nn.Linear(width, groups * self.size, bias=False)
        self.wo = nn.Linear(heads * self.size, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            one.view(batch, length, -1, self.size) for one in (self.wq(x), self.wk(x), self.wv(x))
        )
        q, k = _turned(q, turns), _turned(k, turns)
        k, v = _repeated(k, self.repeats), _repeated(v, self.repeats)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).contiguous().view(batch, length, -1))  # type: ignore[no-any-return]


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = pairs * turns[: x.shape[1]].view(1, x.shape[1], 1, -1)
    return torch.view_as_real(turned).flatten(3).type_as(x)


def _repeated(x: Tensor, count: int) -> Tensor:
    if count == 1:
        return x
    batch, length, groups, size = x.shape
    wide = x[:, :, :, None, :].expand(batch, length, groups, count, size)
    return wide.reshape(batch, length, groups * count, size)


class FeedForward(nn.Module):
    """A gated layer."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer.

    Attributes:
        policy: "none", "full" or "op": what of it is recomputed.
    """

    def __init__(self, width: int, heads: int, groups: int, inner: int, policy: str):
        super().__init__()
        self.attention = Attention(width, heads, groups)
        self.feed_forward = FeedForward(width, inner)
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)
        self.policy = policy

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        if self.policy == "none":
            return self._run(x, turns)
        more: dict[str, Any] = {"context_fn": _of_ops} if self.policy == "op" else {}
        result: Tensor = checkpoint(self._run, x, turns, use_reentrant=False, **more)
        return result

    def _run(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


_SAVED = (
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def _of_ops() -> Any:
    """Return contexts that keep attention and every second matrix product."""
    counted: Counter[str] = Counter()

    def policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        mode = "recompute" if context.is_recompute else "forward"
        if func == torch.ops.aten.mm.default:
            counted[mode] += 1
            is_kept = counted[mode] % 2 == 1
        else:
            is_kept = func in _SAVED
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Llama(nn.Module):
    """The language model.

    Attributes:
        every: 1 in so many layers is recomputed by the policy, the others not at all.
    """

    def __init__(self, shapes: Mapping[str, int], length: int, policy: str, every: int):
        super().__init__()
        width, heads = shapes["hidden_size"], shapes["num_attention_heads"]
        self.tok_embeddings = nn.Embedding(shapes["vocab_size"], width)
        self.register_buffer(
            "turns", torch.empty(length, width // heads // 2, dtype=torch.complex64), False
        )
        self.layers = nn.ModuleList(
            Block(
                width,
                heads,
                shapes["num_key_value_heads"],
                shapes["intermediate_size"],
                policy if (index + 1) % every == 0 else "none",
            )
            for index in range(shapes["num_hidden_layers"])
        )
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.output = nn.Linear(width, shapes["vocab_size"], bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.turns)
        return self.output(self.norm(x))  # type: ignore[no-any-return]


def sharded(model: Any) -> None:
    """Shard each layer, then the model: bf16 to compute, fp32 to reduce gradients."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for index, layer in enumerate(model.layers):
        last = index == len(model.layers) - 1
        fully_shard(layer, mp_policy=policy, reshard_after_forward=not last)
    fully_shard(model, mp_policy=policy)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of logits in fp32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(0, 1))


OPTIMIZERS = {
    "AdamW foreach": partial(torch.optim.AdamW, lr=1e-4, foreach=True),
    "AdamW fused": partial(torch.optim.AdamW, lr=1e-4, fused=True),
    "AdamW": partial(torch.optim.AdamW, lr=1e-4),
}
