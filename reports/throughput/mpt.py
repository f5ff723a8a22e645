"""An MPT as llm-foundry trains it, written anew from its published shapes.

Learned positions, biases everywhere, layer norms in the precision of the layer, attention in one
kernel, the embedding as the head; FSDP on each block, blocks recomputed whole or not at all. The
shapes give the numbers of parameters that the table prints.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 50368
SHAPES = {
    "mpt-125m": (768, 12, 12),
    "mpt-350m": (1024, 16, 24),
    "mpt-760m": (1536, 12, 24),
    "mpt-1b": (2048, 16, 24),
    "mpt-3b": (2560, 20, 32),
    "mpt-7b": (4096, 32, 32),
    "mpt-13b": (5120, 40, 40),
    "mpt-30b": (7168, 56, 48),
    "mpt-70b": (8192, 64, 80),
}
"""By name: width, heads and layers."""


class Block(nn.Module):
    """One layer."""

    def __init__(self, width: int, heads: int, recomputed: bool):
        super().__init__()
        self.heads = heads
        self.recomputed = recomputed
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if not self.recomputed:
            return self._run(x)
        result: Tensor = checkpoint(self._run, x, use_reentrant=False)
        return result

    def _run(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return out


class Mpt(nn.Module):
    """The language model."""

    def __init__(self, name: str, length: int, recomputed: bool):
        super().__init__()
        width, heads, layers = SHAPES[name]
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList(Block(width, heads, recomputed) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.tokens.weight)


def sharded(model: Any, *, pure: bool = False) -> None:
    """Shard each layer, then the model: bf16 to compute; to reduce, fp32, or bf16 where pure."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    reduce = torch.bfloat16 if pure else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce)
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
