"""Workspaces that cuDNN takes for convolutions on cards of compute capability 9.0.

Taken from 1,822 layers that an NVIDIA H200 ran (cuDNN 9.19, torch 2.11):
`reports/hardware/nvidia-h200-torch2.11.0-convolutions.json`. A workspace has two parts:

- Conversions. Kernels for tensor cores read and write NHWC: with NCHW, cuDNN keeps a converted copy
  of input, weight and output in all three directions. Nothing is copied for a 1 x 1 layer of
  stride 1 (a matrix product in either layout) unless the image has an odd number of elements, and
  the weight of a 1 x 1 layer is the same in both. Channels are padded to a multiple of 4 (TF32)
  or 8 (halves), those of images to 4, and halves hold these twice. Without TF32 it is the other
  way round: kernels read NCHW, and convert NHWC.
- Partial sums of weight gradients. Few tiles of a weight would leave most multiprocessors idle, so
  each is computed in slices: as many as fill 132 multiprocessors, each with enough pixels. One
  slice is a tile in fp32. With small batches of 3 x 3 layers, Winograd's tiles are held instead.

Which kernel runs is cuDNN's choice, so a single layer may be off by one of its tensors; over layers
the errors cancel. Not followed: fp32 forward kernels that use Winograd or FFT, and depthwise layers
in TF32 and channels-last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from autobatch.devices.virtual.kernels.sizes import ceil_div, round_up

__all__ = ["Convolution", "Direction", "Precision", "workspace_bytes"]

Direction = Literal["forward", "data_gradient", "weight_gradient"]
Precision = Literal["tf32", "fp32", "half"]

_MULTIPROCESSORS = 132
_IMAGE_CHANNELS = 4
"""Up to so many channels, an input is an image to cuDNN's kernels."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """The shapes of a convolution.

    Attributes:
        data: shape of its input.
        weight: shape of its weight.
        output: shape of what it returns.
        precision: "half" for bf16 and fp16; "tf32" and "fp32" hold 4 bytes per element.
        channels_last: whether its tensors are in NHWC.
        stride: steps in each direction of the image.
        dilation: steps between the elements of the kernel.
        groups: its groups of channels.
        transposed: whether it enlarges, and its weight has the input's channels first.
    """

    data: tuple[int, ...]
    weight: tuple[int, ...]
    output: tuple[int, ...]
    precision: Precision
    channels_last: bool = False
    stride: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    transposed: bool = False

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of its tensors."""
        return 2 if self.precision == "half" else 4

    @property
    def pixels(self) -> int:
        """Elements of one channel on the smaller side: what a weight gradient sums over."""
        return self.data[0] * min(math.prod(self.data[2:]), math.prod(self.output[2:]))

    @property
    def pointwise(self) -> bool:
        """Whether its kernel has one element."""
        return math.prod(self.weight[2:]) == 1

    @property
    def depthwise(self) -> bool:
        """Whether each channel has a kernel of its own."""
        return self.groups > 1 and self.groups == self.data[1]


def workspace_bytes(direction: Direction, layer: Convolution) -> int:
    """Return the bytes that cuDNN takes while it runs one direction of a layer.

    >>> layer = Convolution((32, 128, 28, 28), (128, 128, 3, 3), (32, 128, 28, 28), "tf32")
    >>> workspace_bytes("forward", layer), workspace_bytes("weight_gradient", layer)
    (26279936, 34537472)
    """
    if layer.depthwise:
        if direction == "weight_gradient" and layer.channels_last and layer.precision == "half":
            return 8 * layer.data[0] * _sum_bytes(layer)
        return 0
    if layer.precision == "fp32":
        return _without_tensor_cores(direction, layer)
    if layer.data[1] <= _IMAGE_CHANNELS:
        return _of_images(direction, layer)
    if layer.pointwise and set(layer.stride) == {1}:
        return _pointwise(direction, layer)
    converted = _converted_bytes(layer) if _converts(layer) else 0
    if direction == "weight_gradient":
        if _sums_winograd_tiles(layer):
            return _winograd_bytes(layer)
        return converted + _slices_bytes(layer)
    return converted - (_written_in_place(direction, layer) if converted else 0)


def _bytes(layer: Convolution, shape: tuple[int, ...], channels: int | None = None) -> int:
    """Return the bytes of a tensor, with another number of channels if that is told."""
    size = math.prod(shape) * layer.element_bytes
    return size if channels is None else size // shape[1] * channels


def _sum_bytes(layer: Convolution) -> int:
    """Return the bytes of a weight in fp32."""
    return math.prod(layer.weight) * 4


def _step(layer: Convolution) -> int:
    return 8 if layer.precision == "half" else 4


def _converts(layer: Convolution) -> bool:
    """Whether a kernel for tensor cores needs copies of a layer's tensors."""
    in_group = layer.data[1] // layer.groups
    if layer.groups > 1 and in_group & (in_group - 1):  # no kernel for groups of such a width
        return True
    step = _step(layer)
    padded = layer.groups == 1 and bool(layer.data[1] % step or layer.output[1] % step)
    return padded or not layer.channels_last


def _converted_bytes(layer: Convolution) -> int:
    """Return the bytes of input, weight and output in NHWC, with channels of aligned rows."""
    step = _step(layer) if layer.groups == 1 else 1
    into, out = round_up(layer.data[1], step), round_up(layer.output[1], step)
    size = _bytes(layer, layer.data, into) + _bytes(layer, layer.output, out)
    if not layer.pointwise:
        kernel = math.prod(layer.weight[2:])
        size += into // layer.groups * out * kernel * layer.element_bytes
    return size


def _written_in_place(direction: Direction, layer: Convolution) -> int:
    """Return the bytes of a result that a TF32 kernel writes in NCHW, so that no copy is held.

    Such kernels run where the channels double from a few, and the result is the largest tensor.
    """
    read, written = layer.data, layer.output
    if direction == "data_gradient":
        if not layer.transposed:
            return 0
        read, written = written, read  # runs as a forward pass
    elif layer.transposed:
        return 0
    few = read[1] <= (256 if layer.pointwise else 96)
    if layer.precision == "tf32" and layer.groups == 1 and few and written[1] > read[1]:
        return 0 if written[1] % 4 else _bytes(layer, written)
    return 0


def _slices_bytes(layer: Convolution) -> int:
    """Return the bytes of the partial sums of a weight's gradient."""
    sides = [layer.weight[0], layer.weight[1]]
    rows, columns = (64 if side <= 64 else 128 for side in sides)
    tiles = ceil_div(sides[0], rows) * ceil_div(sides[1] * math.prod(layer.weight[2:]), columns)
    left = tiles % _MULTIPROCESSORS  # whole waves of tiles are not sliced
    enough_pixels = rows * columns * 2 // 5 if layer.precision == "half" else 900
    slices = min(_MULTIPROCESSORS // max(left, 1), layer.pixels // enough_pixels)
    return left * slices * rows * columns * 4 if slices > 1 else 0


def _pointwise(direction: Direction, layer: Convolution) -> int:
    """Return the workspace of a matrix product: 1 x 1, stride 1."""
    odd_rows = math.prod(layer.data[2:]) % 2 == 1
    if direction != "weight_gradient":
        aligned = layer.data[1] % 8 == layer.output[1] % 8 == 0
        return _converted_bytes(layer) if odd_rows and aligned and not layer.channels_last else 0
    if layer.channels_last:
        tiles = ceil_div(math.prod(layer.weight[:2]), 128 * 256)
        at_once, enough_pixels = (66, 1400) if layer.precision == "half" else (132, 64)
        slices = min(at_once // tiles, layer.pixels // enough_pixels)
        return slices * _sum_bytes(layer) if slices > 1 else 0
    converted = _converted_bytes(layer) + _slices_bytes(layer)
    each_image = layer.data[0] * _sum_bytes(layer)  # a product for each image, summed afterwards
    padded = layer.precision == "tf32" and layer.output[1] % 4 != 0
    return converted if odd_rows or padded else min(converted, each_image)


def _of_images(direction: Direction, layer: Convolution) -> int:
    """Return the workspace of a layer that reads images, with their channels padded to 4."""
    half = layer.precision == "half"
    large = math.prod(layer.weight[2:]) >= 49 or (half and len(layer.weight) == 3)
    output = 0 if layer.channels_last else _bytes(layer, layer.output)
    once = _bytes(layer, layer.data, _IMAGE_CHANNELS) + _bytes(layer, layer.weight, _IMAGE_CHANNELS)
    if direction == "weight_gradient":
        if half:
            return 2 * once + output + _slices_bytes(layer)
        return once + _bytes(layer, layer.output) + _slices_bytes(layer) if large else 0
    if half:
        runs = large or direction == "data_gradient"
        runs = runs or (layer.channels_last and set(layer.stride) == {1})
        return 2 * once + output if runs else 0
    whole = _bytes(layer, layer.data) + _bytes(layer, layer.weight)
    if direction == "data_gradient":  # NHWC is what converts here
        if not layer.channels_last:
            return 0
        return once if set(layer.stride) == {1} else whole + _bytes(layer, layer.output)
    in_patches = layer.stride == layer.weight[2:]
    return whole + output if layer.channels_last or (large and not in_patches) else 0


def _is_winograd(layer: Convolution) -> bool:
    """Whether Winograd's algorithm computes a layer: 3 x 3, dense, without gaps."""
    steps = set(layer.stride) | set(layer.dilation)
    return layer.weight[2:] == (3, 3) and steps == {1} and layer.groups == 1


def _winograd_bytes(layer: Convolution) -> int:
    """Return the bytes of 6 x 6 tiles, which overlap: every 4 x 4 elements have one."""
    both = _bytes(layer, layer.data) + _bytes(layer, layer.output)
    return both * 9 // 4 + _sum_bytes(layer) * 4


def _sums_winograd_tiles(layer: Convolution) -> bool:
    """Whether a weight gradient in TF32 has too few pixels for slices, and runs Winograd."""
    few = layer.pixels <= 8192 and layer.data[0] <= 8 and max(layer.weight[:2]) <= 256
    plain = layer.precision == "tf32" and not layer.channels_last
    return few and plain and _is_winograd(layer)


def _without_tensor_cores(direction: Direction, layer: Convolution) -> int:
    """Return the workspace with TF32 off: kernels read NCHW, weight gradients some of each."""
    converted = _converted_bytes(layer)
    if direction != "weight_gradient":
        few = layer.data[1] <= _IMAGE_CHANNELS and direction == "forward"
        return converted if layer.channels_last and layer.groups == 1 and not few else 0
    if layer.data[1] <= _IMAGE_CHANNELS:
        return 0
    if _is_winograd(layer):
        return _winograd_bytes(layer) + (converted if layer.channels_last else 0)
    small = math.prod(layer.output[2:]) < 400 or set(layer.stride) != {1}
    if layer.channels_last or (layer.pointwise and not small):
        return 0
    return converted if layer.groups == 1 else 0
