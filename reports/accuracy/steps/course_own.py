"""A student's own transformer of the same course, written anew from its published semantics.

It differs from the course's in what it keeps: powers are computed twice for a softmax, scores are
masked in place, norms divide, and every layer has rotary tables of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reports.accuracy.steps.course import CourseTransformer, Linear


class Norm(nn.Module):
    """Root mean square normalization in fp32, by a division."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        size = torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-5)
        return (x / size * self.weight).to(dtype)


class Attention(nn.Module):
    """Causal attention whose softmax computes its powers twice."""

    def __init__(self, width: int, heads: int, length: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = (
            Linear(width, width) for _ in range(4)
        )
        for name in ("sines", "cosines"):
            table = torch.empty(length, width // heads // 2)
            self.register_buffer(name, table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (q, k, v))
        q, k = self._turned(q), self._turned(k)
        mask = torch.tril(torch.ones(x.shape[1], x.shape[1])).to(x.device)
        scores = torch.einsum("...qd,...kd->...qk", q, k)
        scores = scores / torch.sqrt(torch.tensor(k.shape[-1], device=x.device))
        scores = scores.masked_fill_(~mask.bool(), -float("inf"))
        largest, _ = torch.max(scores, dim=-1, keepdim=True)
        total = torch.sum(torch.exp(scores - largest), dim=-1, keepdim=True)
        weights = torch.exp(scores - largest) / total
        mixed = torch.einsum("...qk,...kd->...qd", weights, v)
        return self.output_proj(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def _turned(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[-2])
        sines, cosines = (
            self.sines[places][None, :, :, None],
            self.cosines[places][None, :, :, None],
        )
        pairs = x.unflatten(-1, (-1, 2))
        first = cosines * pairs[..., :1] - sines * pairs[..., 1:]
        second = sines * pairs[..., :1] + cosines * pairs[..., 1:]
        return torch.cat([first, second], dim=-1).flatten(-2)


class OwnTransformer(CourseTransformer):
    """The language model."""

    def __init__(self, *, width: int, heads: int, length: int, layers: int, **more: int):
        super().__init__(width=width, heads=heads, length=length, layers=layers, **more)
        for layer in self.layers:
            layer.attn = Attention(width, heads, length)
            layer.ln1, layer.ln2 = Norm(width), Norm(width)
        self.ln_final = Norm(width)
