"""What CUDA's code allocates in which order, seen on a simulated runtime."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.simulated import NARROW, NARROW_BYTES, SAMPLES, blocks, run


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(NARROW, NARROW)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.1)


def test_dropout_makes_its_mask_before_its_output():
    made = [b.size_bytes for b in blocks(Dropped(), "forward") if "dropout" in b.op]
    assert made == [NARROW * SAMPLES, NARROW_BYTES]


def test_autocast_casts_arguments_from_right_to_left():
    trace = run(nn.Linear(64, 32), autocast="bf16")
    casts = [
        b.size_bytes for b in trace.blocks if b.op == "aten::_to_copy" and b.phase == "forward"
    ]
    bias, weight, data = 32 * 2, 64 * 32 * 2, 8 * 64 * 2
    assert casts[:3] == [bias, weight, data]


class Attention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(64, 64), dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)[None, None]
        return F.scaled_dot_product_attention(x, x, x, dropout_p=self.dropout)


def test_seeds_of_dropout_are_on_the_cpu():
    seeds = [b for b in run(Attention(0.1)).blocks if b.size_bytes == 8 and "attention" in b.op]
    assert seeds == []


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(4, 64, 48))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.full((4,), len(x), dtype=torch.int32, device=x.device)
        return torch._grouped_mm(x, self.experts, offs=ends)


def test_experts_run_in_fp32_although_pytorchs_rule_for_shapes_refuses_them():
    trace = run(Experts(), loss=lambda model, batch: model(batch).square().mean())
    made = [
        b.size_bytes for b in trace.blocks if b.op == "aten::_grouped_mm" and b.phase == "forward"
    ]
    assert made[0] == 8 * 48 * 4


class InMath(nn.Module):
    """Attention by its formula, which adds up in fp32 whatever autocast says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)[None, None]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(x, x, x)


def test_nothing_is_cast_inside_of_attention():
    trace = run(InMath(), autocast="bf16", n=8)
    scores = [b for b in trace.blocks if b.op == "aten::bmm" and b.phase == "forward"]
    assert scores[0].size_bytes == 8 * 8 * 4
    softmax = next(i for i, b in enumerate(trace.blocks) if b.op == "aten::_safe_softmax")
    taken = [b.size_bytes for b in trace.blocks[softmax + 1 : softmax + 4]]
    assert taken == [8 * 8, 8, 4]  # masked scores, masked rows, zero
