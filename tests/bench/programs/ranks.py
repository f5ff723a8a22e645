"""One rank of several: objects, reductions, DDP, FSDP2, a common plan, over NCCL; rank 0 tells."""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import autobatch
from autobatch.accumulate import watch
from autobatch.support.patching import patched
from autobatch.support.units import MIB
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


def planned(rank: int) -> dict[str, object]:
    """Let the ranks find one plan for all; each has other tensors on its card."""
    held = torch.empty(rank * 200 * MIB, dtype=torch.uint8, device="cuda")
    layers = nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)
    model = nn.Sequential(nn.Embedding(100, 512), *layers).cuda()
    plan = autobatch.tune(
        nn.parallel.DistributedDataParallel(model),
        target=2**19,
        sample=torch.arange(4),
        loss=lambda model, batch: model(batch).square().mean(),
    )
    del held
    return {"sizes": plan.to_json(), "warnings": plan.warnings}


def windows(rank: int) -> list[str]:
    """Train windows of which one runs out of memory, then let rank 0 fail for good."""
    model = nn.parallel.DistributedDataParallel(layers()[:1].cuda(), device_ids=[rank])
    optimizer = torch.optim.AdamW(model.parameters())
    seen: list[int] = []
    said: list[str] = []

    def loss(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        if rank == 0 and (len(seen) == 2 or len(seen) > 12):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return model(batch).square().mean()

    batches = torch.zeros(32, WIDTH, device="cuda").split(4)
    # norms are garbage where kernels do nothing
    with warnings.catch_warnings(), patched(watch, _norms=lambda tensors: []):
        warnings.simplefilter("ignore")
        try:
            for window in autobatch.windows(
                [*batches, *batches], optimizer, micro_batch=4, accumulation_steps=4, model=model
            ):
                window.run(loss)
                window.step()
                said.append(str(window.micro_batches))
        except autobatch.AutobatchError as error:
            said.append(str(error))
    return said


def main() -> None:
    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    # over NCCL alone, objects are cut: their sizes are compared by a kernel
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", local))
    rank, world = dist.get_rank(), dist.get_world_size()
    total = torch.tensor([rank + 1.0], device="cuda")
    dist.all_reduce(total)
    gathered = [torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(world)]
    dist.all_gather(gathered, torch.tensor([10 + rank], device="cuda"))
    sent = torch.tensor([20 + rank], device="cuda")
    dist.broadcast(sent, src=world - 1)
    dist.barrier()
    found = {
        "gathered": [each.item() for each in gathered],
        "sent": sent.item(),
        "total": total.item(),
        "ddp": trained(nn.parallel.DistributedDataParallel(layers().cuda())),
        "fsdp2": trained(sharded()),
        "devices": torch.cuda.device_count(),
    }
    found["plans"] = [None] * world
    dist.all_gather_object(found["plans"], planned(rank))
    found["windows"] = [None] * world
    dist.all_gather_object(found["windows"], windows(local))
    dist.destroy_process_group()
    if rank == 0:
        tell(found)


if __name__ == "__main__":
    main()
