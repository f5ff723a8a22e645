"""What libraries allocate beside the tensors is on the virtual GPU too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.devices.virtual.kernels.workspaces import _roll
from autobatch.gpus.catalogue import find_gpu
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from tests.support.simulated import (
    NARROW,
    NARROW_BYTES,
    SAMPLES,
    blocks,
    made_by,
    mlp,
    run,
)


def workspaces(convolution: nn.Module, *, gpu: str = "a100-40gb", **options) -> list[int]:
    """Run a convolution between two pointwise layers; return the workspaces of its backward."""
    layout = options.pop("layout", torch.contiguous_format)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.convolution = nn.BatchNorm2d(8), convolution

        def forward(self, x: Tensor) -> Tensor:
            return self.convolution(self.scale(x.to(memory_format=layout)))

    model = Net().to(memory_format=layout)
    workload = Workload(
        model=model,
        batch=batch_builder(torch.zeros(2, 8, 6, 6)),
        loss=lambda model, batch: model(batch).sum(),
        **options,
    )
    trace = VirtualGpu(find_gpu(gpu)).run(workload, micro_batch=4, accumulation_steps=1).trace
    sizes = [block.size_bytes for block in trace.blocks if block.op == "cudnn workspace"]
    return sizes[: len(sizes) // 2]


DATA, WRITTEN = 4 * 8 * 36 * 4, 4 * 16 * 36 * 4


def test_gradients_of_a_convolution_convert_both_activations_and_the_weight_to_nhwc():
    dense = nn.Conv2d(8, 16, 3, padding=1)
    size = DATA + WRITTEN + dense.weight.nbytes
    assert workspaces(dense) == [size, size]
    assert workspaces(dense, autocast="bf16") == [size // 2, size // 2]


@pytest.mark.parametrize(
    ("convolution", "options"),
    [
        (nn.Conv2d(8, 16, 1), {}),
        (nn.Conv2d(8, 16, 3, groups=2), {}),
        (nn.Conv2d(8, 16, 3), {"gpu": "t4"}),
        (nn.Conv2d(8, 16, 3), {"gpu": "rtx-3090", "autocast": "fp16"}),
        (nn.Conv2d(8, 16, 3), {"layout": torch.channels_last}),
    ],
    ids=["1 x 1", "grouped", "no TF32", "slow tensor cores", "already NHWC"],
)
def test_other_convolutions_convert_nothing(convolution, options):
    assert workspaces(convolution, **options) == []


def test_a_transposed_convolution_is_a_data_gradient():
    transposed = nn.ConvTranspose2d(8, 16, 3, padding=1)
    size = DATA + WRITTEN + transposed.weight.nbytes
    assert workspaces(transposed) == [size, size]  # forward, and the gradient of the weight


@pytest.fixture
def without_tf32():
    settings = torch.backends.cudnn.conv
    settings.fp32_precision = "ieee"
    yield
    settings.fp32_precision = "tf32"


def rolled(*dims: int, transposed: bool) -> list[int | str]:
    data = torch.empty(2, 8, 8, 16, device="meta")
    data = data.transpose(1, 2) if transposed else data
    return list(_roll(None, (data, [1] * len(dims), list(dims)), {}, find_gpu("t4")))


def test_every_dimension_but_the_last_is_rolled_into_memory_of_its_own():
    assert rolled(1, transposed=False) == []
    assert rolled(1, 2, 3, transposed=False) == [8192, 8192]
    assert rolled(1, transposed=True) == [8192]
    assert rolled(1, 2, transposed=True) == [8192, 8192, ~0]  # the copy, until the first is rolled


def test_users_who_switch_tf32_off_get_no_tensor_cores(without_tf32):
    assert workspaces(nn.Conv2d(8, 16, 3)) == []


def test_settings_count_although_the_same_layer_was_asked_before_them():
    layer, settings = nn.Conv2d(8, 16, 3, padding=1), torch.backends.cudnn.conv
    with_tf32 = workspaces(layer)
    settings.fp32_precision = "ieee"
    try:
        assert with_tf32 and workspaces(layer) == []
    finally:
        settings.fp32_precision = "tf32"
    assert workspaces(layer) == with_tf32
    with torch.backends.cudnn.flags(enabled=False):
        assert workspaces(layer) == []


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(NARROW, NARROW), nn.LayerNorm(SAMPLES)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x).t())


def test_a_norm_copies_what_is_not_contiguous_while_it_runs():
    assert made_by(Transposed(), "contiguous", "forward") == [NARROW_BYTES]
    backward = blocks(Transposed(), "backward")
    # the input again, and the gradient of the sum, which is one number expanded
    copies = [b.size_bytes for b in backward if b.op == "contiguous"]
    assert copies[:2] == [NARROW_BYTES] * 2


@pytest.mark.parametrize(("gpu", "megabytes"), [("a100-40gb", 8.125), ("h100-80gb", 32)])
def test_cublas_keeps_a_workspace_for_forward_and_one_for_backward(gpu, megabytes):
    trace = run(mlp(), gpu=gpu)
    sizes = [block.size_bytes for block in trace.blocks if block.op == "cublas workspace"]
    assert sizes == [int(megabytes * 2**20)] * 2
