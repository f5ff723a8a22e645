"""A card that is full at every request for memory that two windows make, one after the other.

Tells of each how the run ended, and whether anything of the user's was changed.
"""

from __future__ import annotations

import gc
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.devices.cuda.gpu import CudaGpu
from autobatch.devices.cuda.runtime import CudaRuntime
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from tests.bench.inside import card_full_at
from tests.bench.programs import tell

WIDTH = 1700  # a weight has 11 MiB: a segment of its own


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Copy what a user has: values, gradients, the optimizer's state, random states."""
    values: list[Any] = [torch.get_rng_state(), torch.cuda.get_rng_state(), model.training]
    for parameter in model.parameters():
        gradient, state = parameter.grad, optimizer.state[parameter]
        values += [parameter, gradient, *state.values(), parameter.data_ptr() != 0]
    return [v.detach().cpu().clone() if isinstance(v, Tensor) else v for v in values]


def same(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(before, after, strict=True)
    )


def main() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    workload = Workload(
        model=model,
        batch=batch_builder(torch.ones(2, WIDTH)),
        loss=lambda model, batch: model(batch).square().mean(),
        optimizer=optimizer,
    )
    before, allocated = state_of(model, optimizer), torch.cuda.memory_allocated()
    found = []
    for n in count(1):
        card = CudaGpu(CudaRuntime())
        card_full_at(n)
        with card.hosting(workload):
            run = card.run(workload, micro_batch=1500, accumulation_steps=2)
        card_full_at(0)
        unchanged = same(before, state_of(model, optimizer))
        gc.collect()
        left = torch.cuda.memory_allocated() - allocated
        retries = run.replay.alloc_retries
        found.append(
            {"short": run.shortage is not None, "retries": retries, "same": unchanged, "left": left}
        )
        if run.shortage is None and not retries:
            break
    tell(found)


if __name__ == "__main__":
    main()
