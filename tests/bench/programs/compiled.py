"""A kernel of Triton's, and a compiled model that trains."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import nn

from tests.bench.programs import tell


@triton.jit
def double(source, target, count, BLOCK: tl.constexpr):  # noqa: N803
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    tl.store(target + index, 2 * tl.load(source + index, mask=inside), mask=inside)


def main() -> None:
    source = torch.zeros(5000, device="cuda")
    double[(5,)](source, torch.empty_like(source), 5000, BLOCK=1024)
    layers = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 8))
    model = torch.compile(layers.cuda())
    loss = model(torch.zeros(16, 64, device="cuda")).square().mean()
    loss.backward()
    learned = [p.grad is not None for p in layers.parameters()]
    tell({"learned": learned, "peak": torch.cuda.max_memory_allocated()})


if __name__ == "__main__":
    main()
