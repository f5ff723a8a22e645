"""Convolutions on the virtual GPU: which rule a card has, and the layout of results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.devices.virtual.kernels.convolutions import (
    CONVOLUTION,
    CONVOLUTION_BACKWARD,
    convolution_scratch,
)
from autobatch.devices.virtual.kernels.layouts import relaid
from autobatch.devices.virtual.kernels.memory_formats import layout_of
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.scratch import RESULT
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload

HOW: list[Any] = [[1, 1], [1, 1], [1, 1], False, [0, 0], 1]


def tensor(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    return torch.empty(shape, device="meta").to(memory_format=layout)


def taken(capability: tuple[int, int], wanted: list[bool] | None = None) -> list[int | str]:
    """Return the steps of a 3 x 3 layer on an A100 of another compute capability."""
    data, weight = tensor(32, 128, 28, 28), tensor(128, 128, 3, 3)
    gpu = replace(find_gpu("a100-40gb"), compute_capability=capability)
    if wanted is None:
        return list(convolution_scratch(CONVOLUTION, [data, weight, None, *HOW], gpu))
    args = [data, data, weight, None, *HOW, wanted]
    return list(convolution_scratch(CONVOLUTION_BACKWARD, args, gpu))


ALL_BYTES = 26279936
WORKSPACE = "cudnn workspace"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_cards_that_were_not_measured_keep_the_least_that_is_known(capability):
    assert taken(capability) == [RESULT]  # and no workspace
    assert taken(capability, [True, True, False]) == [
        *(RESULT, WORKSPACE, ALL_BYTES, ~0),
        *(RESULT, WORKSPACE, ALL_BYTES, ~1),
    ]


def test_the_measured_rule_converts_forward_passes_and_sums_slices():
    assert taken((9, 0)) == [RESULT, WORKSPACE, ALL_BYTES]
    weight = ALL_BYTES + 126 * 128 * 128 * 4
    assert taken((9, 0), [True, True, False]) == [
        *(RESULT, WORKSPACE, ALL_BYTES, ~0),
        *(RESULT, WORKSPACE, weight, ~1),
    ]
    assert taken((9, 0), [False, True, False]) == [RESULT, WORKSPACE, weight, ~0]


NCHW, NHWC = torch.contiguous_format, torch.channels_last
LARGE, SMALL = 4 * 2 * 16 * 8 * 8, 4 * 16 * 16 * 9


@pytest.mark.parametrize(
    ("data", "weight", "gradient", "forward", "backward"),
    [
        (NCHW, NCHW, NCHW, [], []),
        (NHWC, NHWC, NHWC, [], []),
        # the gradient of patches that are rows of a matrix: seen on the bench in every vision model
        (NCHW, NCHW, NHWC, [], [LARGE]),
        (NHWC, NCHW, NHWC, [SMALL], [SMALL]),
        (NCHW, NHWC, NHWC, [LARGE], [LARGE]),
        (NHWC, NCHW, NCHW, [SMALL], [LARGE, SMALL]),
    ],
)
def test_what_is_in_another_layout_is_copied(data, weight, gradient, forward, backward):
    data, gradient = (tensor(2, 16, 8, 8, layout=layout) for layout in (data, gradient))
    weight = tensor(16, 16, 3, 3, layout=weight)
    gpu = find_gpu("a100-40gb")

    def copies(op, args):
        steps = convolution_scratch(op, args, gpu, (False, False))
        return [step for step in steps if isinstance(step, int) and step >= 0]

    assert copies(CONVOLUTION, [data, weight, None, *HOW]) == forward
    wanted = [True, True, False]
    given = [gradient, data, weight, None, *HOW, wanted]
    assert copies(CONVOLUTION_BACKWARD, given) == backward


def test_slices_of_a_tensor_in_nhwc_are_in_nhwc():
    whole = tensor(2, 8, 4, 5, layout=NHWC)
    assert layout_of(whole[..., 1:]) is NHWC
    assert layout_of(tensor(2, 8, 4, 5)[..., 1:]) is NCHW
    assert layout_of(tensor(2, 8, 1, 1)) is NCHW


@pytest.mark.parametrize("nhwc", ["data", "weight"])
def test_results_are_in_nhwc_where_the_data_or_the_weight_is(nhwc):
    layouts = dict.fromkeys(("data", "weight"), torch.contiguous_format)
    layouts[nhwc] = torch.channels_last
    data, weight = (
        tensor(2, 8, 4, 4, layout=layouts["data"]),
        tensor(16, 8, 3, 3, layout=layouts["weight"]),
    )
    out = relaid(CONVOLUTION, [data, weight, None, *HOW], tensor(2, 16, 4, 4))
    assert out.is_contiguous(memory_format=torch.channels_last)
    gradients = relaid(
        CONVOLUTION_BACKWARD, [out, data, weight], (tensor(2, 8, 4, 4), tensor(16, 8, 3, 3), None)
    )
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in gradients[:2])


def test_results_of_other_convolutions_stay_as_they_are():
    data, weight, out = tensor(2, 8, 4, 4), tensor(16, 8, 3, 3), tensor(2, 16, 4, 4)
    assert relaid(CONVOLUTION, [data, weight, None, *HOW], out) is out


class ImagesInNhwc(torch.nn.Module):
    """Two convolutions, weights in NCHW; only the images are in NHWC."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.to(memory_format=torch.channels_last)))


def test_a_simulated_run_keeps_nhwc_and_copies_the_weights_to_it():
    workload = Workload(
        model=ImagesInNhwc(),
        batch=batch_builder(torch.zeros(2, 8, 6, 6)),
        loss=lambda model, batch: model(batch).square().mean(),
    )
    trace = (
        VirtualGpu(find_gpu("a100-40gb")).run(workload, micro_batch=4, accumulation_steps=1).trace
    )
    copies = [b for b in trace.blocks if b.op == "contiguous" and b.phase == "forward"]
    assert {b.size_bytes for b in copies} == {8 * 8 * 9 * 4}  # none of an activation
