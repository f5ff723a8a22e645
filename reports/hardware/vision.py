"""Image models in pure PyTorch, of the usual sizes: ResNet-50, ViT-B/16, Swin-T, ConvNeXt-T, U-Net.

They are written for what they take in memory: the operations are those of the published models, the
initial weights are PyTorch's own.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StochasticDepth(nn.Module):
    """Leave a residual branch out for some samples."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        shape = (len(x),) + (1,) * (x.dim() - 1)
        kept = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


def rates(last: float, depth: int) -> list[float]:
    """Return rates that rise evenly from 0 to the last block's."""
    return [last * block / max(depth - 1, 1) for block in range(depth)]


def convolved(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


def _deep_stem(width: int) -> nn.Sequential:
    return nn.Sequential(
        convolved(3, width // 2, 3, 2),
        nn.ReLU(inplace=True),
        convolved(width // 2, width // 2, 3),
        nn.ReLU(inplace=True),
        convolved(width // 2, width, 3),
    )


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut; the stride is in the middle one."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.reduce = convolved(inputs, width, 1)
        self.middle = convolved(width, width, 3, stride)
        self.expand = convolved(width, 4 * width, 1)
        same = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Identity() if same else convolved(inputs, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.reduce(x), inplace=True)
        y = F.relu(self.middle(y), inplace=True)
        return F.relu(self.expand(y) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """ResNet-50 with the default depths; a deep stem is three 3 x 3 convolutions (ResNet-D)."""

    def __init__(
        self, depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, deep_stem: bool = False
    ):
        super().__init__()
        self.stem = _deep_stem(width) if deep_stem else convolved(3, width, 7, 2)
        blocks: list[nn.Module] = []
        inputs = width
        for stage, depth in enumerate(depths):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                blocks.append(Bottleneck(inputs, width * 2**stage, stride))
                inputs = 4 * width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images), inplace=True)
        x = self.blocks(F.max_pool2d(x, 3, stride=2, padding=1))
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, *, causal: bool = False, dropout: float = 0.0):
        super().__init__()
        self.heads, self.causal, self.rate = heads, causal, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.qkv(x).view(n, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=self.causal)
        return F.dropout(self.out(y.transpose(1, 2).reshape(n, length, width)), rate)


class TransformerBlock(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool = False,
        dropout: float = 0.0,
        approximate: str = "none",
    ):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=1e-5 if causal else 1e-6)
        self.attention = Attention(width, heads, causal=causal, dropout=dropout)
        self.norm_2 = nn.LayerNorm(width, eps=1e-5 if causal else 1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        y: Tensor = x + self.mlp(self.norm_2(x))
        return y


class VisionTransformer(nn.Module):
    """ViT-B/16 with a class token."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12, size: int = 224):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, stride=16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, (size // 16) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


class WindowAttention(nn.Module):
    """Attention inside windows, with a learned bias for each pair of relative positions."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("index", relative_index(window))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        n, length, width = x.shape
        parts = self.qkv(x).view(n, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        bias = self.table[self.index].view(length, length, -1).permute(2, 0, 1)
        scores = scores + bias
        if mask is not None:
            windows = len(mask)
            scores = scores.view(n // windows, windows, self.heads, length, length)
            scores = (scores + mask[:, None]).view(n, self.heads, length, length)
        y = scores.softmax(dim=-1).to(value.dtype) @ value
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(n, length, width))
        return mixed


def relative_index(window: int) -> Tensor:
    """Return, for each pair of places in a window, the row of the bias table."""
    place = torch.arange(window * window)
    rows, columns = place // window, place % window
    down = rows[:, None] - rows[None, :] + window - 1
    across = columns[:, None] - columns[None, :] + window - 1
    return (down * (2 * window - 1) + across).flatten()


def shift_mask(size: int, window: int, shift: int) -> Tensor:
    """Return, for each window of a shifted image, what keeps places that were apart from mixing."""
    place = torch.arange(size)
    band = (place >= size - window).long() + (place >= size - shift).long()
    regions = (band[:, None] * 3 + band[None, :])[None, :, :, None]
    within = windows_of(regions, window).squeeze(-1)
    apart = within[:, :, None] != within[:, None, :]
    return torch.zeros(apart.shape).masked_fill(apart, -100.0)


def windows_of(x: Tensor, window: int) -> Tensor:
    n, height, across, width = x.shape
    x = x.view(n, height // window, window, across // window, window, width)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, width)


class SwinBlock(nn.Module):
    """Attention in windows that every other block shifts by half of their size."""

    def __init__(self, width: int, heads: int, size: int, window: int, shifted: bool, rate: float):
        super().__init__()
        self.window = window
        self.shift = window // 2 if shifted and size > window else 0
        self.norm_1 = nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, window)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.depth = StochasticDepth(rate)
        mask = shift_mask(size, window, self.shift) if self.shift else None
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.depth(self._attended(self.norm_1(x)))
        y: Tensor = x + self.depth(self.mlp(self.norm_2(x)))
        return y

    def _attended(self, x: Tensor) -> Tensor:
        n, height, across, width = x.shape
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        y = self.attention(windows_of(x, self.window), self.mask)
        rows, columns = height // self.window, across // self.window
        y = y.view(n, rows, columns, self.window, self.window, width)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(n, height, across, width)
        return y.roll((self.shift, self.shift), (1, 2)) if self.shift else y


class Merge(nn.Module):
    """Join each two by two patches into one of twice the width."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        y: Tensor = self.reduce(self.norm(torch.cat(parts, dim=-1)))
        return y


class Swin(nn.Module):
    """Swin-T with the default sizes."""

    def __init__(
        self,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        width: int = 96,
        heads: tuple[int, ...] = (3, 6, 12, 24),
        size: int = 224,
        window: int = 7,
    ):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.norm_1 = nn.LayerNorm(width)
        side = size // 4
        rate = iter(rates(0.2, sum(depths)))
        layers: list[nn.Module] = []
        for stage, depth in enumerate(depths):
            if stage:
                layers.append(Merge(width))
                width, side = 2 * width, side // 2
            layers += [
                SwinBlock(width, heads[stage], side, window, bool(block % 2), next(rate))
                for block in range(depth)
            ]
        self.layers = nn.Sequential(*layers)
        self.norm_2 = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm_1(self.patches(images).permute(0, 2, 3, 1))
        logits: Tensor = self.head(self.norm_2(self.layers(x)).mean(dim=(1, 2)))
        return logits


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """A depthwise convolution, then two linear layers over the channels."""

    def __init__(self, width: int, rate: float):
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.channels = nn.Sequential(
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )
        self.scale = nn.Parameter(torch.full((width,), 1e-6))
        self.depth = StochasticDepth(rate)

    def forward(self, x: Tensor) -> Tensor:
        y = self.channels(self.spatial(x).permute(0, 2, 3, 1))
        return x + self.depth((y * self.scale).permute(0, 3, 1, 2))


class ConvNext(nn.Module):
    """ConvNeXt-T with the default sizes."""

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 3, 9, 3),
        widths: tuple[int, ...] = (96, 192, 384, 768),
    ):
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, widths[0], 4, stride=4),
            ChannelNorm(widths[0], eps=1e-6),
        ]
        rate = iter(rates(0.1, sum(depths)))
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if stage:
                before = widths[stage - 1]
                layers += [ChannelNorm(before, eps=1e-6), nn.Conv2d(before, width, 2, stride=2)]
            layers += [ConvNextBlock(width, next(rate)) for _ in range(depth)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], 1000)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.layers(images).mean(dim=(2, 3))))
        return logits


def twice_convolved(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [*convolved(width, outputs, 3), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Levels down and up again, joined by skip connections; gives a class to every pixel."""

    def __init__(self, width: int = 64, depth: int = 4, classes: int = 21):
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.stem = twice_convolved(3, width)
        self.down = nn.ModuleList(twice_convolved(a, b) for a, b in pairwise(widths))
        rising = widths[-2::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in rising)
        self.join = nn.ModuleList(twice_convolved(2 * w, w) for w in rising)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        levels = [self.stem(images)]
        for block in self.down:
            levels.append(block(F.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([levels.pop(), up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits
