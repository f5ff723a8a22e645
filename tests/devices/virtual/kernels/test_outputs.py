"""What CUDA runs as one kernel is one on the virtual GPU too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autobatch.devices.virtual.kernels.outputs import FUSED
from tests.support.simulated import (
    NARROW,
    NARROW_BYTES,
    SAMPLES,
    blocks,
    made_by,
)


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
    made = blocks(nn.Sequential(nn.Linear(NARROW, NARROW), kind()), "backward")
    names = [block.op for block in made if block.size_bytes == NARROW_BYTES]
    assert [name for name in names if "backward" in name] == [
        f"aten::{kind.__name__.lower()}_backward"
    ]
    assert len(names) <= 2  # and the gradient of the sum, where it is not a view


@pytest.mark.skipif(not hasattr(torch.ops.aten, "_fused_rms_norm"), reason="not in this PyTorch")
def test_rms_norm_saves_one_number_per_row():
    model = nn.Sequential(nn.Linear(NARROW, NARROW), nn.RMSNorm(NARROW))
    assert made_by(model, "_fused_rms_norm", "forward") == [NARROW_BYTES, SAMPLES * 4]
    assert made_by(model, "pow", "forward") == []


def test_log_sigmoid_keeps_no_buffer():
    model = nn.Sequential(nn.Linear(NARROW, NARROW), nn.LogSigmoid())
    assert made_by(model, "log_sigmoid", "forward") == [NARROW_BYTES, 0]
