"""Plans of the GPU in the machine, found in the ways in which users ask for them."""

from __future__ import annotations

import sys

import torch
from torch import nn

import autobatch
from tests.bench.programs import tell

WIDTH = 512
SAMPLE = torch.arange(4)


def model() -> nn.Module:
    layers = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
    return nn.Sequential(nn.Embedding(1000, WIDTH), *layers)


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def plan_of(net: nn.Module, **options: object) -> dict[str, object]:
    held = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    plan = autobatch.tune(net, target=2**18, sample=SAMPLE, loss=loss, prove=True, **options)
    return {
        "proven": plan.proven,
        "ceiling": plan.ceiling,
        "evidence": plan.footprint.evidence,
        "capacity": plan.gpu.capacity_bytes,
        "reserved": plan.footprint.peak_reserved_bytes,
        "budget": plan.budget_bytes,
        "ooms_below": [
            t.micro_batch for t in plan.trials if t.oom and t.micro_batch <= plan.ceiling
        ],
        "warnings": plan.warnings,
        "left": (torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0) - held,
    }


def isolated() -> dict[str, object]:
    found = plan_of(model(), isolate=True)
    assert not torch.cuda.is_initialized()
    return found


def with_a_fraction() -> dict[str, object]:
    torch.cuda.set_per_process_memory_fraction(0.6)
    try:
        return plan_of(model())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


WAYS = {
    "isolated": isolated,
    "on the host": lambda: plan_of(model()),
    "on the card": lambda: plan_of(model().cuda()),
    "bf16": lambda: plan_of(model(), autocast="bf16"),
    "fraction": with_a_fraction,
}

if __name__ == "__main__":
    tell({way: WAYS[way]() for way in sys.argv[1:] or WAYS})
