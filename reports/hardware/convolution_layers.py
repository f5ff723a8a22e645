"""Convolutions of published models, whose workspaces are recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Layer:
    """One convolution; `image` has the spatial sizes of the input."""

    name: str
    channels: tuple[int, int]
    kernel: tuple[int, ...]
    image: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    groups: int = 1
    dilation: int = 1
    transposed: bool = False

    def shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the input, the weight and the output."""
        into, out = self.channels
        first, second = (into, out) if self.transposed else (out, into)
        if self.transposed:
            sizes = [
                (size - 1) * self.stride - 2 * self.padding + self.dilation * (k - 1) + 1
                for size, k in zip(self.image, self.kernel, strict=True)
            ]
        else:
            sizes = [
                (size + 2 * self.padding - self.dilation * (k - 1) - 1) // self.stride + 1
                for size, k in zip(self.image, self.kernel, strict=True)
            ]
        weight = (first, second // self.groups, *self.kernel)
        return (batch, into, *self.image), weight, (batch, out, *sizes)


def square(name: str, into: int, out: int, kernel: int, image: int, **more: Any) -> Layer:
    """Return a 2-D layer, padded to keep the image's size unless told otherwise."""
    padding = more.pop("padding", more.get("dilation", 1) * (kernel - 1) // 2)
    return Layer(name, (into, out), (kernel,) * 2, (image,) * 2, padding=padding, **more)


def depthwise(name: str, channels: int, kernel: int, image: int, stride: int = 1) -> Layer:
    return square(name, channels, channels, kernel, image, groups=channels, stride=stride)


COMMON = (
    square("stem 7x7/2", 3, 64, 7, 224, stride=2),
    square("resnet 3x3", 64, 64, 3, 56),
    square("resnet 3x3", 128, 128, 3, 28),
    square("resnet 3x3", 256, 256, 3, 14),
    square("resnet 3x3", 512, 512, 3, 7),
    square("resnet 1x1 out", 64, 256, 1, 56),
    square("resnet 1x1 in", 256, 64, 1, 56),
    square("resnet 3x3/2", 128, 128, 3, 56, stride=2),
    square("resnet 1x1/2", 256, 512, 1, 56, stride=2),
    square("resnet 1x1 out", 128, 512, 1, 28),
    square("resnet 1x1 in", 512, 128, 1, 28),
    square("resnet 3x3/2", 256, 256, 3, 28, stride=2),
    square("resnet 1x1/2", 512, 1024, 1, 28, stride=2),
    square("resnet 1x1 out", 256, 1024, 1, 14),
    square("resnet 1x1 in", 1024, 256, 1, 14),
    square("resnet 3x3/2", 512, 512, 3, 14, stride=2),
    square("resnet 1x1/2", 1024, 2048, 1, 14, stride=2),
    square("resnet 1x1 out", 512, 2048, 1, 7),
    square("resnet 1x1 in", 2048, 512, 1, 7),
    square("unet 3x3", 3, 64, 3, 256),
    square("unet 3x3", 64, 64, 3, 256),
    square("unet 3x3", 64, 128, 3, 128),
    square("unet 3x3", 128, 128, 3, 128),
    square("unet 3x3", 256, 256, 3, 64),
    square("unet 3x3", 512, 512, 3, 32),
    square("unet 3x3", 1024, 512, 3, 32),
    square("unet 3x3", 128, 64, 3, 256),
    square("unet 1x1", 64, 2, 1, 256),
)

SPECIAL = (
    square("patch 16x16/16", 3, 768, 16, 224, stride=16, padding=0),
    square("patch 4x4/4", 3, 96, 4, 224, stride=4, padding=0),
    depthwise("convnext 7x7", 96, 7, 56),
    depthwise("efficientnet 3x3", 32, 3, 112),
    square("transposed 2x2/2", 128, 64, 2, 128, stride=2, padding=0, transposed=True),
    Layer("wav2vec2 k3/2", (512, 512), (3,), (8000,), stride=2),
    Layer("volume 3x3x3", (32, 64), (3,) * 3, (64,) * 3, padding=1),
    square("resnext 3x3", 128, 128, 3, 56, groups=32),
    square("dilated 3x3", 256, 256, 3, 28, dilation=2),
    depthwise("convnext 7x7", 768, 7, 7),
    depthwise("efficientnet 5x5/2", 240, 5, 28, stride=2),
    depthwise("efficientnet 3x3", 1152, 3, 7),
    Layer("wav2vec2 position", (768, 768), (128,), (499,), padding=64, groups=16),
    Layer("wav2vec2 k10/5", (1, 512), (10,), (80_000,), stride=5),
    square("transposed 4x4/2", 256, 128, 4, 32, stride=2, padding=1, transposed=True),
    square("transposed 2x2/2", 1024, 512, 2, 16, stride=2, padding=0, transposed=True),
    square("regnet 3x3", 224, 224, 3, 28, groups=2),
    square("downsample 2x2/2", 96, 192, 2, 56, stride=2, padding=0),
)

RARE = (
    square("odd 3x3, 225", 3, 32, 3, 225, stride=2),
    square("odd 3x3, 7 channels", 7, 50, 3, 112),
    square("odd 3x3, 50 channels", 50, 50, 3, 57),
    square("odd 1x1, 50 channels", 50, 7, 1, 57),
    depthwise("convnext 7x7", 192, 7, 28),
    depthwise("convnext 7x7", 384, 7, 14),
    depthwise("efficientnet 3x3/2", 96, 3, 112, stride=2),
    depthwise("efficientnet 5x5", 480, 5, 14),
    depthwise("efficientnet 5x5", 672, 5, 14),
    square("resnext 3x3", 256, 256, 3, 28, groups=32),
    square("resnext 3x3", 1024, 1024, 3, 7, groups=32),
    square("regnet 3x3/2", 448, 448, 3, 28, groups=4, stride=2),
    square("dilated 3x3", 512, 512, 3, 28, dilation=4),
    square("aspp 3x3", 2048, 256, 3, 28, dilation=12),
    Layer("wav2vec2 k3/2", (512, 512), (3,), (16_000,), stride=2),
    Layer("wav2vec2 k2/2", (512, 512), (2,), (1000,), stride=2),
    Layer("volume 3x3x3", (64, 64), (3,) * 3, (32,) * 3, padding=1),
    Layer("volume 1x1x1", (64, 3), (1,) * 3, (64,) * 3),
    Layer("volume transposed 2x2x2/2", (64, 32), (2,) * 3, (32,) * 3, stride=2, transposed=True),
)
