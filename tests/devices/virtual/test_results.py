"""Rules for the layouts of plain results say what PyTorch's own way of finding them says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autobatch.devices.virtual import fake_mode, recipes
from autobatch.devices.virtual.fake_mode import VirtualMode
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.devices.virtual.results import plain_recipe
from autobatch.gpus.catalogue import find_gpu
from autobatch.workload.workload import Workload
from tests.support.simulated import run

ACTIVATIONS = (
    F.elu, F.gelu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.mish, F.relu, F.silu,
    F.softplus, torch.abs, torch.exp, torch.neg, torch.sigmoid, torch.sin, torch.tanh,
)  # fmt: skip


@pytest.fixture
def compared(monkeypatch) -> dict[Any, set[bool]]:
    """Compare rule and FakeTensorMode at every call; return by op whether the rule answered."""
    answered: dict[Any, set[bool]] = {}
    answer = VirtualMode._answer

    def both(self: Any, func: Any, args: Any, kwargs: Any, key: Any, tensors: Any) -> Any:
        ours = None if key is None else plain_recipe(func, args, kwargs, tensors)
        output, theirs = answer(self, func, args, kwargs, key, tensors)
        answered.setdefault(func, set()).add(ours is not None)
        if ours is not None:
            assert ours == theirs, func
        return output, theirs

    monkeypatch.setattr(fake_mode, "plain_recipe", lambda *call: None)
    monkeypatch.setattr(VirtualMode, "_answer", both)
    return answered


class Elements(nn.Module):
    """Runs every kernel of single elements on data of one layout."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        total = x * self.scale
        for function in ACTIVATIONS:
            total = total + function(total * 2)
        for function in (F.relu_, F.silu, torch.sigmoid_):
            total = total + function(total * 2)
        changed = total.clone()
        changed.mul_(2 * torch.ones_like(total)).add_(torch.zeros_like(x), alpha=2)
        return changed - x / total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sample",
    [
        torch.zeros(2, 6),
        torch.zeros(2, 3, 4, 5),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(2, 1, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(2, 3, 1, 1).to(memory_format=torch.channels_last),
        torch.zeros(2, 5, 3).transpose(1, 2),
        torch.zeros(2, 6)[:, ::2],
        torch.zeros(2, 1).expand(2, 4),
    ],
)
def test_results_of_single_elements(compared, sample, dtype) -> None:
    run(Elements(), sample=sample.to(dtype), loss=lambda model, batch: model(batch).sum(), n=3)
    assert True in compared[torch.ops.aten.mul.Tensor] | compared[torch.ops.aten.silu.default]


class Layers(nn.Module):
    """Convolutions and norms of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False),
            nn.Conv2d(8, 16, 1),
            nn.Conv2d(16, 16, 3, dilation=2, padding="same"),
            nn.Conv2d(16, 16, (1, 3), stride=(2, 1), bias=False),
            nn.ConvTranspose2d(16, 8, 2, stride=2),
            nn.GroupNorm(2, 8),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(8, 4, 1),
            nn.Flatten(),
            nn.LayerNorm(4),
            nn.RMSNorm(4),
            nn.LayerNorm((4,), elementwise_affine=False),
        )

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("autocast", [None, "bf16", "fp16"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_of_convolutions_and_norms(compared, layout, autocast) -> None:
    run(
        Layers().to(memory_format=layout),
        sample=torch.zeros(2, 3, 16, 16).to(memory_format=layout),
        loss=lambda model, batch: model(batch).float().square().sum(),
        autocast=autocast,
        n=3,
    )
    if layout is torch.contiguous_format:
        assert True in compared[torch.ops.aten.convolution.default]
        assert True in compared[torch.ops.aten.convolution_backward.default]
    assert True in compared[torch.ops.aten.native_layer_norm.default]


def test_a_convolution_without_batch_dimension_and_an_empty_tensor_are_left_to_pytorch() -> None:
    convolution = torch.ops.aten.convolution.default
    weight = torch.empty(4, 3, 3, 3, device="meta")
    rest = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    for shape in ((3, 8, 8), (0, 3, 8, 8)):
        data = torch.empty(shape, device="meta")
        assert plain_recipe(convolution, (data, weight, *rest), {}, (data, weight)) is None
    empty = torch.empty(0, 3, device="meta")
    assert plain_recipe(torch.ops.aten.gelu.default, (empty,), {}, (empty,)) is None


def test_whole_numbers_and_mixed_dtypes_are_left_to_pytorch() -> None:
    whole = torch.empty(2, 3, dtype=torch.int64, device="meta")
    single, half = (torch.empty(2, 3, dtype=d, device="meta") for d in (torch.float, torch.half))
    for first, second in ((whole, whole), (single, half), (single, single[0])):
        assert plain_recipe(torch.ops.aten.mul.Tensor, (first, second), {}, (first, second)) is None
    assert plain_recipe(torch.ops.aten.mul.Tensor, (2, 3), {}, ()) is None


class Levered(nn.Module):
    """Weights of several layouts, of which some are alike, and buffers of which some are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
        self.turned = nn.Parameter(torch.zeros(16, 16).t())
        self.part = nn.Parameter(torch.zeros(16, 32)[:, ::2])
        self.image = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x):
        empty = torch.tensor([], dtype=x.dtype, device=x.device)
        x = torch.cat([empty, x], dim=0) if empty.dim() == x.dim() else x
        for _ in range(2):
            x = x + torch.tensor([], dtype=x.dtype, device=x.device).sum()
        return self.layers(x) @ self.turned @ self.part + self.image.sum() * int(self.steps)


def test_copies_from_the_host_are_those_of_pytorch_and_made_once(monkeypatch) -> None:
    copies = []
    answer = VirtualMode._answer

    def counted(self: Any, func: Any, *call: Any) -> Any:
        copies.append(func) if func is torch.ops.aten._to_copy.default else None
        return answer(self, func, *call)

    def ran() -> tuple[Any, int]:
        copies.clear()
        workload = Workload(
            model=Levered(),
            batch=lambda n: torch.zeros(n, 16),
            loss=lambda model, batch: model(batch.bfloat16()).float().sum(),
            changes=(lambda model: model.to(torch.bfloat16),),
        )
        found = VirtualGpu(find_gpu("t4")).run(workload, micro_batch=3, accumulation_steps=2)
        return found.trace, len(copies)

    monkeypatch.setattr(VirtualMode, "_answer", counted)
    trace, few = ran()
    monkeypatch.setattr(recipes, "_is_from_host", lambda *call: False)
    plain, many = ran()
    assert trace == plain
    assert few < many / 2


def test_views_of_what_a_kernel_makes_elsewhere_take_no_memory_the_first_time() -> None:
    """The seed of attention's dropout is on the host; selective checkpointing detaches it."""

    def loss(model, x):
        q = model(x).unflatten(-1, (2, 8)).transpose(1, 2)
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        out, _, seed, _ = attend(q, q, q, None, compute_log_sumexp=True, dropout_p=0.1)
        seed.detach()
        return out.square().mean()

    trace = run(nn.Linear(16, 16), sample=torch.zeros(2, 4, 16), loss=loss)
    assert not [block for block in trace.blocks if block.op == "aten::detach"]
