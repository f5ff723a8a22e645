"""Language models in pure PyTorch, of the usual sizes: GPT-2, BERT, T5, a Llama, an LSTM.

Two towers with a contrastive loss are here as well. They are written for what they take in memory:
the operations are those of the published models. Each forward pass returns the loss.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reports.hardware.vision import TransformerBlock


def next_word_loss(logits: Tensor, words: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())


def narrow(module: nn.Module) -> None:
    """Draw weights as GPT-2 and BERT do; wider ones overflow in fp16."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Gpt2(nn.Module):
    """GPT-2 of 124 million parameters, its output tied to the embeddings."""

    def __init__(
        self,
        words: int = 50257,
        length: int = 1024,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
    ):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Embedding(length, width)
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(width, heads, causal=True, dropout=0.1, approximate="tanh")
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.apply(narrow)

    def forward(self, words: Tensor) -> Tensor:
        places = torch.arange(words.shape[1], device=words.device)
        x = self.dropout(self.words(words) + self.places(places))
        logits = F.linear(self.norm(self.blocks(x)), self.words.weight)
        return next_word_loss(logits, words)


class BertLayer(nn.Module):
    """A post-norm layer whose attention leaves out padding."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_1 = nn.LayerNorm(width, eps=1e-12)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm_2 = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        projections = (self.query, self.key, self.value)
        query, key, value = (split_heads(projection(x), self.heads) for projection in projections)
        seen = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=0.1 if self.training else 0.0
        )
        x = self.norm_1(x + self.dropout(self.out(join_heads(seen))))
        y: Tensor = self.norm_2(x + self.dropout(self.shrink(F.gelu(self.grow(x)))))
        return y


class Bert(nn.Module):
    """BERT-base that tells masked words; its output is tied to the embeddings."""

    def __init__(
        self,
        words: int = 30522,
        length: int = 512,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
    ):
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.places = nn.Embedding(length, width)
        self.kinds = nn.Embedding(2, width)
        self.norm_1 = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList(BertLayer(width, heads) for _ in range(depth))
        self.dense = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(words))
        self.apply(narrow)

    def forward(self, words: Tensor, is_word: Tensor, labels: Tensor) -> Tensor:
        places = torch.arange(words.shape[1], device=words.device)
        x = self.words(words) + self.kinds(torch.zeros_like(words)) + self.places(places)
        x = self.dropout(self.norm_1(x))
        mask = is_word[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm_2(F.gelu(self.dense(x)))
        logits = F.linear(x, self.words.weight, self.bias)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class RmsNorm(nn.Module):
    """Scale by the root of the mean square, in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class T5Attention(nn.Module):
    """Attention without scaling, with a bias that is added to the scores."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        query = split_heads(self.query(x), self.heads)
        key = split_heads(self.key(context), self.heads)
        value = split_heads(self.value(context), self.heads)
        seen = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=0.1 if self.training else 0.0, scale=1.0
        )
        mixed: Tensor = self.out(join_heads(seen))
        return mixed


class T5Layer(nn.Module):
    """Self-attention, attention to the encoder where there is one, and two linear layers."""

    def __init__(self, width: int, heads: int, inner: int, *, decodes: bool):
        super().__init__()
        self.attention, self.norm_1 = T5Attention(width, heads), RmsNorm(width)
        self.cross = T5Attention(width, heads) if decodes else None
        self.norm_2 = RmsNorm(width) if decodes else None
        self.grow = nn.Linear(width, inner, bias=False)
        self.shrink = nn.Linear(inner, width, bias=False)
        self.norm_3 = RmsNorm(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, bias: Tensor, context: Tensor | None = None) -> Tensor:
        y = self.norm_1(x)
        x = x + self.dropout(self.attention(y, y, bias))
        if self.cross is not None and self.norm_2 is not None and context is not None:
            x = x + self.dropout(self.cross(self.norm_2(x), context, None))
        y = self.dropout(F.relu(self.grow(self.norm_3(x))))
        return x + self.dropout(self.shrink(y))


class RelativeBias(nn.Module):
    """A learned bias for each head and each bucket of distances, near ones finer than far ones."""

    def __init__(self, heads: int, *, both_ways: bool, buckets: int = 32, farthest: int = 128):
        super().__init__()
        self.both_ways, self.buckets, self.farthest = both_ways, buckets, farthest
        self.table = nn.Embedding(buckets, heads)

    def forward(self, length: int) -> Tensor:
        place = torch.arange(length, device=self.table.weight.device)
        bias = self.table(self._buckets(place[None, :] - place[:, None])).permute(2, 0, 1)
        if not self.both_ways:
            later = torch.ones(length, length, dtype=torch.bool, device=place.device).triu(1)
            bias = bias.masked_fill(later, -torch.inf)
        return bias[None]

    def _buckets(self, distance: Tensor) -> Tensor:
        buckets, first = self.buckets, torch.zeros_like(distance)
        if self.both_ways:
            buckets //= 2
            first = (distance > 0).long() * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        share = torch.log(distance.clamp(min=1) / exact) / math.log(self.farthest / exact)
        far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, far)


class T5(nn.Module):
    """T5-small: encoder and decoder over shared embeddings."""

    def __init__(
        self,
        words: int = 32128,
        width: int = 512,
        depth: int = 6,
        heads: int = 8,
        inner: int = 2048,
    ):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.dropout = nn.Dropout(0.1)
        self.encoder_bias = RelativeBias(heads, both_ways=True)
        self.decoder_bias = RelativeBias(heads, both_ways=False)
        self.encoder, self.decoder = (
            nn.ModuleList(T5Layer(width, heads, inner, decodes=decodes) for _ in range(depth))
            for decodes in (False, True)
        )
        self.norm_1, self.norm_2 = RmsNorm(width), RmsNorm(width)
        self.apply(narrow)

    def forward(self, words: Tensor, labels: Tensor) -> Tensor:
        context = self.dropout(self.words(words))
        bias = self.encoder_bias(words.shape[1])
        for layer in self.encoder:
            context = layer(context, bias)
        context = self.dropout(self.norm_1(context))
        x = self.dropout(self.words(F.pad(labels[:, :-1], (1, 0))))
        bias = self.decoder_bias(labels.shape[1])
        for layer in self.decoder:
            x = layer(x, bias, context)
        x = self.dropout(self.norm_2(x)) * x.shape[-1] ** -0.5
        logits = F.linear(x, self.words.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class LlamaLayer(nn.Module):
    """Grouped attention over rotated queries and keys, then a gated linear unit; no biases."""

    def __init__(self, width: int, heads: int, groups: int, inner: int):
        super().__init__()
        self.heads, self.groups = heads, groups
        head = width // heads
        self.norm_1, self.norm_2 = RmsNorm(width), RmsNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, groups * head, bias=False)
        self.value = nn.Linear(width, groups * head, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.grow = nn.Linear(width, inner, bias=False)
        self.shrink = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norm_1(x)
        query = rotated(split_heads(self.query(y), self.heads), cos, sin)
        key = rotated(split_heads(self.key(y), self.groups), cos, sin)
        value = split_heads(self.value(y), self.groups)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(join_heads(seen))
        y = self.norm_2(x)
        return x + self.shrink(F.silu(self.gate(y)) * self.grow(y))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels by an angle that grows with the position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Llama(nn.Module):
    """A Llama of 1.1 billion parameters; `checkpoints` recomputes each layer in backward."""

    def __init__(
        self,
        words: int = 32000,
        width: int = 2048,
        depth: int = 22,
        heads: int = 32,
        groups: int = 4,
        inner: int = 5632,
        *,
        checkpoints: bool = False,
    ):
        super().__init__()
        self.checkpoints, self.head_width = checkpoints, width // heads
        self.words = nn.Embedding(words, width)
        self.layers = nn.ModuleList(LlamaLayer(width, heads, groups, inner) for _ in range(depth))
        self.norm = RmsNorm(width)
        self.out = nn.Linear(width, words, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        cos, sin = self._turns(words.shape[1], x)
        for layer in self.layers:
            if self.checkpoints:
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin)
        return next_word_loss(self.out(self.norm(x)).float(), words)

    def _turns(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        half = torch.arange(0, self.head_width, 2, device=like.device) / self.head_width
        angles = torch.arange(length, device=like.device)[:, None] * 10000.0**-half
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class LstmLanguageModel(nn.Module):
    """Three LSTM layers between tied word embeddings."""

    def __init__(self, words: int = 33278, width: int = 650, depth: int = 3):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.rnn = nn.LSTM(width, width, num_layers=depth, dropout=0.4, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.rnn(F.dropout(self.words(words), 0.4, self.training))
        return next_word_loss(F.linear(states, self.words.weight, self.bias), words)


class TwoTowers(nn.Module):
    """Image and text towers whose similarities form an n x n matrix: memory is quadratic in n."""

    def __init__(self, width: int = 256, depth: int = 3, words: int = 8192, size: int = 64):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.image_places = nn.Parameter(torch.zeros((size // 8) ** 2, width))
        self.words = nn.Embedding(words, width)
        self.image_tower, self.text_tower = (
            nn.Sequential(*(TransformerBlock(width, width // 64) for _ in range(depth)))
            for _ in range(2)
        )
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.image_places
        seen = F.normalize(self.image_tower(x).mean(1), dim=-1)
        read = F.normalize(self.text_tower(self.words(words)).mean(1), dim=-1)
        logits = self.scale.exp() * seen @ read.T
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
