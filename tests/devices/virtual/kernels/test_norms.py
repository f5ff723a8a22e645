"""Normalizations take the scratch that PyTorch's CUDA code takes on a simulated runtime."""

from __future__ import annotations

import pytest
import torch

from autobatch.devices.virtual.kernels.norms import norm_scratch
from autobatch.gpus.catalogue import find_gpu

BACKWARD = torch.ops.aten.native_layer_norm_backward.default
GPU = find_gpu("a100-40gb")


def sizes(rows, width, dtype=torch.float32):
    data, weight = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((rows, width), (width,))
    )
    args = (data, data, [width], None, None, weight, weight, [True] * 3)
    steps = norm_scratch(BACKWARD, args, {}, GPU)
    return [step for step in steps if isinstance(step, int) and step >= 0]


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "taken"),
    [
        (65536, 96, torch.float32, []),
        (65537, 4096, torch.float32, []),
        (65537, 32, torch.float32, [262272] * 2 + [128] * 2),
        (70000, 96, torch.float32, [840192] * 2 + [384, 442368, 8] * 2),
        (70000, 96, torch.bfloat16, [420096] * 2 + [192, 442368, 8] * 2),
        (200000, 384, torch.float32, [4193280] * 2 + [1536, 8454144, 12] * 2),
    ],
)
def test_gradients_over_many_rows_are_added_up_in_two_steps(rows, width, dtype, taken):
    assert sizes(rows, width, dtype) == taken


def test_a_layer_norm_copies_the_input_first_and_the_gradient_last():
    rows, columns = (torch.empty(shape, device="meta") for shape in ((64, 512), (512, 64)))
    weight = torch.empty(512, device="meta")
    for gradient, data, steps in (
        (rows, columns.t(), ["contiguous", 131072, "results"]),
        (columns.t(), rows, ["results", "contiguous", 131072]),
    ):
        args = (gradient, data, [512], None, None, weight, weight, [True] * 3)
        assert norm_scratch(BACKWARD, args, {}, GPU) == steps


def test_a_group_norm_keeps_a_scale_and_a_shift_for_every_channel_of_every_sample():
    data = torch.empty(8, 16, 32, 16, device="meta").transpose(1, 2)
    forward = torch.ops.aten.native_group_norm.default
    copied, sizes = ["results", "contiguous", 262144], (8, 32, 256, 8, 1e-5)
    assert norm_scratch(forward, (data, None, None, *sizes), {}, GPU) == copied
    weight = torch.empty(32, device="meta")
    args = (data, weight, weight, *sizes)
    assert norm_scratch(forward, args, {}, GPU) == [*copied, "norm scratch", 1024, 1024]
