"""Ways to share a model out other than FSDP2: FSDP1, tensor parallel plans, shared states.

The peaks are those of PyTorch's CUDA code on a simulated runtime, as rank 0 of 4 ranks in a fake
process group: eight layers of two products, 1,024 x 4,096, at four samples of 256 positions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import UsageError, WorkloadError
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.accounting import footprint_of
from autobatch.records.footprint import Footprint
from autobatch.support.units import MIB
from autobatch.workload.workload import Workload

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("this PyTorch was built without torch.distributed", allow_module_level=True)
fsdp = pytest.importorskip("torch.distributed.fsdp", reason="no FSDP2 in this PyTorch")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("no FSDP2 in this PyTorch", allow_module_level=True)

GPU = find_gpu("a100-40gb")
RANKS = 4
PARAMETERS = 256 * MIB


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(1024, 4096, bias=False)
        self.down = nn.Linear(4096, 1024, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).float().mean()


def shared(sharding: Any, **more: Any) -> tuple[Footprint, tuple[str, ...]]:
    with torch.device("meta"):
        model = Net()
    workload = Workload(
        model=model,
        batch=lambda n: torch.zeros(n, 256, 1024),
        loss=loss,
        world_size=RANKS,
        sharding=sharding,
        **more,
    )
    run = VirtualGpu(GPU).run(workload, micro_batch=4, accumulation_steps=1)
    return footprint_of(run.trace, run.replay, GPU, "simulated", simulated=True), run.notes


def flat(model: nn.Module, **options: Any) -> nn.Module:
    wraps = fsdp.wrap.ModuleWrapPolicy({Layer})
    return fsdp.FullyShardedDataParallel(model, auto_wrap_policy=wraps, **options)


BF16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}


@pytest.mark.filterwarnings("ignore:.*NO_SHARD.*")
@pytest.mark.parametrize(
    ("options", "mib"),
    [
        ({}, 484.25),
        ({"use_orig_params": True}, 484.25),
        ({"sharding_strategy": "SHARD_GRAD_OP"}, 676.25),
        ({"sharding_strategy": "NO_SHARD"}, 1300.25),
        ({"mixed_precision": BF16}, 356.25),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_fsdp1_takes_what_it_takes_on_cuda(options, mib):
    given = dict(options)
    if "sharding_strategy" in given:
        given["sharding_strategy"] = fsdp.ShardingStrategy[given["sharding_strategy"]]
    if "mixed_precision" in given:
        given["mixed_precision"] = fsdp.MixedPrecision(**given["mixed_precision"])
    found, notes = shared(partial(flat, **given))
    assert found.peak_allocated_bytes / MIB == pytest.approx(mib, abs=0.01)
    assert not notes


def split_in_two_ways(model: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cuda", (RANKS,))
    for layer in model.layers:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(layer, mesh, plan)


def test_a_tensor_parallel_plan_alone_leaves_a_rank_its_part_of_each_product():
    found, _ = shared(split_in_two_ways)
    assert found.parameters_bytes == PARAMETERS // RANKS
    assert found.gradients_bytes == PARAMETERS // RANKS
    assert found.optimizer_bytes == pytest.approx(2 * PARAMETERS // RANKS, rel=1e-3)


def offloaded(model: Any) -> None:
    for module in (*model.layers, model):
        fsdp.fully_shard(module, offload_policy=fsdp.CPUOffloadPolicy())


def test_offloaded_parameters_and_their_states_are_not_on_the_gpu():
    found, _ = shared(offloaded)
    assert found.parameters_bytes == found.optimizer_bytes == 0
    assert found.peak_allocated_bytes > 2 * PARAMETERS // 8  # gathered layers


def test_an_optimizer_that_shares_out_its_states_finds_a_process_group():
    """ZeRO-1: whole parameters and gradients, a quarter of the states."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def make(parameters: Any) -> Any:
        return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.AdamW, lr=1e-3)

    found, _ = shared("ddp", optimizer=make)
    assert found.parameters_bytes == PARAMETERS
    assert found.gradients_bytes == 2 * PARAMETERS  # and DDP's buckets
    assert found.optimizer_bytes == pytest.approx(2 * PARAMETERS / RANKS, rel=1e-3)
    assert not dist.is_initialized()


def test_a_function_that_shares_nothing_out_is_told_what_would():
    with pytest.raises(UsageError, match="tensor parallel plan"):
        shared(lambda model: None)


@pytest.mark.parametrize("is_inside", [False, True])
def test_data_parallelism_in_a_function_is_told_the_word_for_it(is_inside):
    """As it wraps the model, or a part of it."""
    wrap = nn.parallel.DistributedDataParallel
    make = wrap.__init__

    def policy(model: Any) -> nn.Module:
        if is_inside:
            model.layers[0] = wrap(model.layers[0])
            return model
        return wrap(model)

    with pytest.raises(UsageError, match=r'sharding="ddp", which counts its buckets') as caught:
        shared(policy)
    assert "\n" not in str(caught.value)
    assert wrap.__init__ is make


def test_a_model_that_is_sharded_already_is_to_be_passed_as_it_was_before():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed import fake_pg  # noqa: F401

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Net()
        for module in (*model.layers, model):
            fsdp.fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()
    advice = r'as it is before fully_shard, with world_size and sharding="fsdp", or pass sharding=f'
    for sharding in ("ddp", "fsdp", offloaded):
        workload = Workload(
            model=model,
            batch=lambda n: torch.zeros(n, 256, 1024),
            loss=loss,
            world_size=RANKS,
            sharding=sharding,
        )
        with pytest.raises(WorkloadError, match=advice):
            VirtualGpu(GPU).run(workload, micro_batch=4, accumulation_steps=1)
