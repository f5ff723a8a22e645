"""One rank of several: objects, reductions, DDP and FSDP2 over NCCL. Prints on rank 0."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.bench.programs import tell

WIDTH, LAYERS = 1024, 4


def layers() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def trained(model: nn.Module) -> int:
    """Train two windows; return the peak of what was allocated."""
    optimizer = torch.optim.AdamW(model.parameters())
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        model(torch.zeros(8, WIDTH, device="cuda")).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()


def sharded() -> nn.Module:
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    with torch.device("meta"):
        model = layers()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to_empty(device="cuda")


def main() -> None:
    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    rank, world = dist.get_rank(), dist.get_world_size()
    objects: list[object] = [None] * world
    dist.all_gather_object(objects, {"rank": rank, "text": "x" * rank})
    sent = [f"from {rank}"]
    dist.broadcast_object_list(sent, src=world - 1)
    total = torch.tensor([rank + 1.0], device="cuda")
    dist.all_reduce(total)
    dist.barrier()
    found = {
        "objects": objects,
        "sent": sent,
        "total": total.item(),
        "ddp": trained(nn.parallel.DistributedDataParallel(layers().cuda())),
        "fsdp2": trained(sharded()),
        "devices": torch.cuda.device_count(),
    }
    dist.destroy_process_group()
    if rank == 0:
        tell(found)


if __name__ == "__main__":
    main()
