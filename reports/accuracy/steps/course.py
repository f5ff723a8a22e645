"""The transformer of a public course (CS336), written anew from its published shapes and semantics.

Pre-norm blocks with rotary positions, a SwiGLU, attention that is written out, no biases, no
dropout; linear layers and attention products are `torch.einsum`. What matters for memory is which
ops run, as each may keep what its backward pass needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Linear(nn.Module):
    """A linear layer without bias."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class Embedding(nn.Module):
    """Rows of a table, by indexing."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens, :]


class RMSNorm(nn.Module):
    """Root mean square normalization in fp32, op by op."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        x = x * scale
        return (self.weight * x).to(dtype)


class Rotary(nn.Module):
    """Rotary positions of pairs of neighbours, with cosines and sines in one buffer."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.register_buffer("table", torch.empty(2, length, width // 2), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.table[:, positions, :]
        turned = (cos * first - sin * second, sin * first + cos * second)
        return torch.stack(turned, dim=-1).flatten(-2).contiguous()


class Attention(nn.Module):
    """Causal attention that is written out."""

    def __init__(self, width: int, heads: int, rotary: Rotary):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = (
            Linear(width, width) for _ in range(4)
        )
        self.rotary = rotary

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (q, k, v))
        places = torch.arange(x.shape[1], device=x.device)
        q, k = self.rotary(q, places[None, None]), self.rotary(k, places[None, None])
        mask = places[None, None, :, None] >= places[None, None, None, :]
        mixed = _attend(q, k, v, mask)
        return self.output_proj(mixed.transpose(1, 2).flatten(-2).contiguous())


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("...qd,...kd->...qk", q, k) / math.sqrt(k.shape[-1])
    scores = torch.where(mask, scores, float("-inf"))
    return torch.einsum("...qk,...kd->...qd", softmax(scores), v)


def softmax(x: Tensor) -> Tensor:
    """Return the softmax over the last dimension, op by op."""
    shifted = x - torch.max(x, dim=-1, keepdim=True)[0]
    powers = torch.exp(shifted)
    return powers / torch.sum(powers, dim=-1, keepdim=True)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative log-likelihood, op by op."""
    shifted = logits - torch.max(logits, dim=-1, keepdim=True)[0]
    log_softmax = shifted - torch.log(torch.sum(torch.exp(shifted), dim=-1, keepdim=True))
    return torch.mean(torch.gather(-log_softmax, -1, targets.unsqueeze(-1)))


class SwiGLU(nn.Module):
    """A gated feed-forward layer; the activation is a product of two ops."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.w1, self.w2, self.w3 = (
            Linear(width, inner),
            Linear(inner, width),
            Linear(width, inner),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.w1(x)
        return self.w2((gate * torch.sigmoid(gate)) * self.w3(x))


class Block(nn.Module):
    """One layer."""

    def __init__(self, width: int, heads: int, inner: int, rotary: Rotary):
        super().__init__()
        self.attn = Attention(width, heads, rotary)
        self.ffn = SwiGLU(width, inner)
        self.ln1, self.ln2 = RMSNorm(width), RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.ffn(self.ln2(x))


class CourseTransformer(nn.Module):
    """The language model.

    Attributes:
        segment: layers in one checkpoint (non-reentrant); None checkpoints nothing.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        length: int,
        width: int,
        layers: int,
        heads: int,
        inner: int,
        segment: int | None = None,
    ):
        super().__init__()
        self.token_embeddings = Embedding(vocabulary, width)
        rotary = Rotary(length, width // heads)
        self.layers = nn.ModuleList(Block(width, heads, inner, rotary) for _ in range(layers))
        self.ln_final = RMSNorm(width)
        self.lm_head = Linear(width, vocabulary)
        self.segment = segment

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embeddings(tokens)
        if self.segment is None:
            x = _through(x, self.layers)
        else:
            for start in range(0, len(self.layers), self.segment):
                part = list(self.layers)[start : start + self.segment]
                x = checkpoint(_through, x, part, use_reentrant=False)
        return self.lm_head(self.ln_final(x))  # type: ignore[no-any-return]


def _through(x: Tensor, layers: Iterable[nn.Module]) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class CourseAdamW(torch.optim.Optimizer):
    """The course's AdamW: one parameter after the other, its states made anew in each step."""

    def __init__(self, parameters: Any, lr: float = 1e-3):
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "decay": 0.01})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.data, group, first, second)

    def _update(self, p: Any, grad: Tensor, group: Any, first: float, second: float) -> None:
        state = self.state[p]
        steps = state.get("t", 1)
        mean = state.get("m", torch.zeros_like(grad))
        square = state.get("v", torch.zeros_like(grad))
        mean = first * mean + (1 - first) * grad
        square = second * square + (1 - second) * torch.square(grad)
        rate = group["lr"] * math.sqrt(1 - second**steps) / (1 - first**steps)
        p.data -= rate * mean / (torch.sqrt(square) + group["eps"])
        p.data -= group["lr"] * group["decay"] * p.data
        state["m"], state["v"], state["t"] = mean, square, steps + 1


def torch_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return PyTorch's own cross entropy of flattened logits."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer whose states are shared out parameter by parameter; this is rank 0's part.

    Ranks take turns over the parameters, and each sends those that it updated to the others, in
    place.
    """

    def __init__(self, parameters: Any, make: Callable[[Any], Any], world_size: int):
        everything = list(parameters)
        super().__init__(everything, {})
        self.inner = make(everything[::world_size])

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
