"""One rank of two that train under DDP, with gradients beside its buckets or in them."""

from __future__ import annotations

import gc
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

import autobatch
from autobatch.workload.workload import Workload
from tests.bench.programs import tell

WIDTH, SAMPLES, STEPS = 1024, 512, 2


def layers() -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(12)))


def trained(*, in_buckets: bool, steps: int) -> int:
    """Train three windows; return the peak of what was allocated."""
    model = nn.parallel.DistributedDataParallel(layers().cuda(), gradient_as_bucket_view=in_buckets)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        for step in range(steps):
            with model.no_sync() if step < steps - 1 else torch.enable_grad():
                loss = model(torch.zeros(SAMPLES, WIDTH, device="cuda")).square().mean() / steps
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss
        gc.collect()  # the first buckets, which DDP replaces, are in a circle of objects
    return torch.cuda.max_memory_allocated()


def promised(*, in_buckets: bool, steps: int) -> int:
    workload = Workload(
        model=layers(),
        batch=lambda n: torch.zeros(n, WIDTH),
        loss=lambda model, batch: model(batch).square().mean(),
        world_size=2,
        sharding="ddp",
        gradient_as_bucket_view=in_buckets,
    )
    given = {"micro_batch": SAMPLES, "accumulation_steps": steps, "gpu": "a100-40gb"}
    return autobatch.predict(workload, **given).peak_allocated_bytes


def main() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    how = {"in_buckets": sys.argv[1] == "in_buckets", "steps": int(sys.argv[2])}
    ran, foretold = trained(**how), promised(**how)
    if rank == 0:
        tell({"ran": ran, "promised": foretold})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
