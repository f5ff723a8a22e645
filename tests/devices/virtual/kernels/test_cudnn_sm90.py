"""The rule for compute capability 9.0 beside the rows that an H200 gave."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from statistics import median, quantiles
from typing import Any, NamedTuple

import pytest

from autobatch.devices.virtual.kernels.cudnn_sm90 import Convolution, Direction, workspace_bytes
from tests.support import ROOT

ROWS = json.loads(
    (ROOT / "reports" / "hardware" / "nvidia-h200-torch2.11.0-convolutions.json").read_text(
        encoding="utf-8"
    )
)["convolutions"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "data_gradient", "weight_gradient")


class Compared(NamedTuple):
    row: dict[str, Any]
    direction: Direction
    measured: int
    said: int
    error: float  # as a share of all tensors of the layer


def layer_of(row: dict[str, Any]) -> Convolution:
    sides = len(row["input"]) - 2
    return Convolution(
        data=tuple(row["input"]),
        weight=tuple(row["weight"]),
        output=tuple(row["output"]),
        precision={"bf16": "half", "fp16": "half"}.get(row["dtype"], row["dtype"]),
        channels_last=row["format"] == "channels_last",
        stride=(row["stride"],) * sides,
        dilation=(row["dilation"],) * sides,
        groups=row["groups"],
        transposed=row["transposed"],
    )


def compared(**wanted: Any) -> Iterator[Compared]:
    rows = [row for row in ROWS if not row["benchmark"] and not row["error"]]
    for row in rows:
        if any(row[key] not in values for key, values in wanted.items()):
            continue
        layer = layer_of(row)
        shapes = layer.data, layer.weight, layer.output
        whole = sum(map(math.prod, shapes)) * layer.element_bytes
        for direction in DIRECTIONS:
            taken = row["ops"][direction]["allocations"]
            measured = sum(size for size, end in taken if end == "freed")
            said = workspace_bytes(direction, layer)
            yield Compared(row, direction, measured, said, (said - measured) / whole)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "most"), [("tf32", 0.6), ("bf16", 0.2), ("fp16", 0.2), ("fp32", 1.0)]
)
def test_most_layers_are_met(dtype, most, layout):
    errors = [abs(each.error) for each in compared(dtype=[dtype], format=[layout])]
    assert len(errors) > 400
    assert median(errors) < 0.001
    assert quantiles(errors, n=10)[-1] < most


@pytest.mark.parametrize("dtype", ["tf32", "bf16", "fp16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bytes_of_all_layers_in_nchw_are_those_measured(dtype, direction):
    rows = [
        each
        for each in compared(dtype=[dtype], format=["contiguous"], batch=[8, 32])
        if each.direction == direction
    ]
    assert sum(row.said for row in rows) == pytest.approx(
        sum(row.measured for row in rows), rel=0.15
    )


def test_layers_of_published_models_are_within_a_kilobyte():
    names = ["resnet 3x3/2", "resnet 1x1 out", "unet 3x3"]
    rows = [
        row
        for row in compared(layer=names, dtype=["bf16"], format=["contiguous"], batch=[32])
        if row.direction == "forward"
    ]
    assert len(rows) > 10
    assert all(abs(row.said - row.measured) < 1024 for row in rows)


RESNET = Convolution((32, 64, 56, 56), (64, 64, 3, 3), (32, 64, 56, 56), "tf32")


def test_a_weight_gradient_holds_copies_and_partial_sums():
    copies = workspace_bytes("data_gradient", RESNET)
    assert workspace_bytes("weight_gradient", RESNET) - copies == 126 * 64 * 64 * 4


def test_images_are_padded_to_four_channels_twice_in_half_precision():
    shapes = (32, 3, 224, 224), (64, 3, 7, 7), (32, 64, 112, 112)
    stem = Convolution(*shapes, "half", stride=(2, 2))
    image, weight, output = 32 * 4 * 224 * 224 * 2, 64 * 4 * 49 * 2, 32 * 64 * 112 * 112 * 2
    assert workspace_bytes("forward", stem) == 2 * (image + weight) + output == 77120528 - 16
