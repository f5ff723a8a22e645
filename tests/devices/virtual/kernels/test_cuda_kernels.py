"""What CUDA runs as one kernel, or in place, is so on the virtual GPU too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.devices.virtual.kernels.outputs import FUSED
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.trace import Allocation
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload

WIDTH, SAMPLES = 16, 4
TENSOR_BYTES = WIDTH * SAMPLES * 4


def blocks(model: nn.Module, phase: str) -> list[Allocation]:
    workload = Workload(
        model=model,
        batch=batch_builder(torch.zeros(2, WIDTH)),
        loss=lambda model, batch: model(batch).sum(),
        optimizer=torch.optim.SGD,
    )
    device = VirtualGpu(find_gpu("a100-40gb"))
    trace = device.run(workload, micro_batch=SAMPLES, accumulation_steps=1).trace
    marks = [mark.event for mark in trace.marks if mark.window == 0 and mark.phase == phase]
    ends = [mark.event for mark in trace.marks if mark.event > marks[0]]
    made = trace.events[marks[0] : ends[0]]
    return [trace.blocks[event] for event in made if event >= 0]


def made_by(model: nn.Module, op: str, phase: str = "backward") -> list[int]:
    return [block.size_bytes for block in blocks(model, phase) if op in block.op]


@pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm", "CUDA"),
    reason="a CPU build of PyTorch has no CUDA kernels to compare with",
)
def test_every_op_with_a_kernel_for_cuda_beside_a_composite_one_is_known():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    both = {
        name.removeprefix("aten::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::")
        and has(name, "CUDA")
        and has(name, "CompositeImplicitAutograd")
    }
    assert both <= set(FUSED)


@pytest.mark.parametrize("kind", [nn.SiLU, nn.Mish])
def test_the_backward_of_an_activation_is_one_tensor(kind):
    made = blocks(nn.Sequential(nn.Linear(WIDTH, WIDTH), kind()), "backward")
    names = [block.op for block in made if block.size_bytes == TENSOR_BYTES]
    assert [name for name in names if "backward" in name] == [
        f"aten::{kind.__name__.lower()}_backward"
    ]
    assert len(names) <= 2  # and the gradient of the sum, where it is not a view


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_fused_rms_norm"), reason="not in this PyTorch")
def test_rms_norm_saves_one_number_per_row():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH))
    assert made_by(model, "_fused_rms_norm", "forward") == [TENSOR_BYTES, SAMPLES * 4]
    assert made_by(model, "pow", "forward") == []


def test_log_sigmoid_keeps_no_buffer():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LogSigmoid())
    assert made_by(model, "log_sigmoid", "forward") == [TENSOR_BYTES, 0]


class Branches(nn.Module):
    """Gradients that meet: some the engine may add in place, some it may not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.second(x)  # the skipped gradient is free again when the other one comes
        x = x + torch.tanh(x)
        x = x.exp() + x.sigmoid()
        x = x + x.view(-1, WIDTH)  # one gradient, shared by both branches
        return x + x.t().reshape(-1, WIDTH)


def test_gradients_are_summed_in_place_where_the_real_engine_does_it():
    model = Branches()
    loss = model(torch.zeros(SAMPLES, WIDTH)).sum()
    # torch 2.10 and 2.11 warn without acc_events that another cycle would clear the events
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        loss.backward()
    real = [event.name for event in profiled.events()]
    assert real.count("aten::add_") >= 3
    assert real.count("aten::add") >= 1
    assert len(made_by(model, "aten::add.Tensor")) == real.count("aten::add")


class SumOfTemporaries(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        kept = gradient * 3
        total = kept + gradient * 4
        return F.relu(total) + kept


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return SumOfTemporaries.apply(self.first(x))


def test_sums_in_a_users_own_backward_take_memory():
    assert made_by(Custom(), "aten::add.Tensor") == [TENSOR_BYTES, TENSOR_BYTES]


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


def test_users_who_switch_tf32_off_get_no_tensor_cores(without_tf32):
    assert workspaces(nn.Conv2d(8, 16, 3)) == []


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(SAMPLES)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x).t())


def test_a_norm_copies_what_is_not_contiguous_while_it_runs():
    assert made_by(Transposed(), "contiguous", "forward") == [TENSOR_BYTES]
    backward = blocks(Transposed(), "backward")
    # the input again, and the gradient of the sum, which is one number expanded
    assert [b.size_bytes for b in backward if b.op == "contiguous"] == [TENSOR_BYTES] * 2
