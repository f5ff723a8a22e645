"""Plans of the GPU in the machine, found in the ways in which users ask for them."""

from __future__ import annotations

import json
import sys

import torch
from torch import nn

import autobatch

WIDTH = 512
SAMPLE = torch.zeros(4, WIDTH)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def plan_of(net: nn.Module, **options: object) -> dict[str, object]:
    held = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    plan = autobatch.tune(net, target=2**16, sample=SAMPLE, loss=loss, **options)
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


def main() -> None:
    found = {}
    if "isolated" in sys.argv:
        found["isolated"] = plan_of(model(), prove=True, isolate=True)
        found["parent has a context"] = torch.cuda.is_initialized()
    found["on the host"] = plan_of(model(), prove=True)
    found["on the card"] = plan_of(model().cuda(), prove=True)
    found["bf16"] = plan_of(model(), prove=True, autocast="bf16")
    torch.cuda.set_per_process_memory_fraction(0.6)
    found["fraction"] = plan_of(model(), prove=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
