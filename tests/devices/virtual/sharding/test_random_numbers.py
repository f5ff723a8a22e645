"""Random numbers on DTensors: initialization of shards, dropout in tensor parallel plans.

On CUDA the state of a generator is in host memory. What DTensor copies of it to the device is read
off its source: `OffsetBasedRNGTracker.__init__`, and in torch 2.10 also each `_distribute_region`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import WorkloadError
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.trace import Trace
from autobatch.support.torch_private import torch_version
from autobatch.workload.workload import Workload

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("this PyTorch was built without torch.distributed", allow_module_level=True)
fsdp = pytest.importorskip("torch.distributed.fsdp", reason="no FSDP2 in this PyTorch")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("no FSDP2 in this PyTorch", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import _random  # noqa: E402
from torch.distributed.tensor.parallel import (  # noqa: E402
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

GPU = find_gpu("a100-40gb")
RANKS = 4
STATE_BYTES = 16
COPIES_EACH_DRAW = torch_version() == (2, 10)

Hidden = Callable[[torch.Tensor], torch.Tensor]


def dropped(hidden: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(hidden, 0.1)


class Net(nn.Module):
    """Two products with something random between them."""

    def __init__(self, between: Hidden = dropped, *, recomputes: bool = False):
        super().__init__()
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)
        self.between = between
        self.recomputes = recomputes

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(torch.relu(self.up(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.recomputes else self.body(x)


def run(model: nn.Module, sharding: Any, *, windows: int = 2) -> Trace:
    workload = Workload(
        model=model,
        batch=lambda n: torch.zeros(n, 64),
        loss=lambda model, batch: model(batch).sum(),
        optimizer=partial(torch.optim.AdamW, foreach=False),
        world_size=RANKS,
        sharding=sharding,
    )
    gpu = VirtualGpu(GPU)
    done = gpu.run(workload, micro_batch=32, accumulation_steps=1, windows=windows)
    assert not done.notes
    return done.trace


def sizes(trace: Trace) -> list[int]:
    """Return the bytes of blocks in order of allocation, without those of generators' states."""
    return [size for block in trace.blocks if (size := block.size_bytes) != STATE_BYTES]


def states(trace: Trace) -> tuple[int, int]:
    """Return how many states of generators were on the device, and how many at most at once."""
    found = {i for i, block in enumerate(trace.blocks) if block.size_bytes == STATE_BYTES}
    live = most = 0
    for event in trace.events:
        if (event if event >= 0 else ~event) in found:
            live += 1 if event >= 0 else -1
            most = max(most, live)
    assert live == 0
    return len(found), most


def in_parts(model: Any, *, is_local: bool = False) -> None:
    plan = {"up": ColwiseParallel(use_local_output=is_local), "down": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cuda", (RANKS,)), plan)


def in_parts_and_shards(model: Any, *, is_local: bool = False) -> None:
    mesh = init_device_mesh("cuda", (2, 2), mesh_dim_names=("shards", "parts"))
    plan = {"up": ColwiseParallel(use_local_output=is_local), "down": RowwiseParallel()}
    parallelize_module(model, mesh["parts"], plan)
    fsdp.fully_shard(model, mesh=mesh["shards"])


# -- dropout and its kind


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("sharding", [in_parts, in_parts_and_shards])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_dropout_takes_on_a_dtensor_what_it_takes_on_its_local_part(sharding, recomputes):
    """Checkpointing keeps the state of the generator, which is in host memory."""
    model = Net(recomputes=recomputes)
    assert sizes(run(model, sharding)) == sizes(run(model, partial(sharding, is_local=True)))


@pytest.mark.parametrize("windows", [2, 3])
def test_the_first_draw_takes_three_copies_of_the_generators_state_at_once(windows):
    """The state to send, the one to compare it with, and what that says of each byte."""
    found, at_once = states(run(Net(), in_parts, windows=windows))
    assert at_once == 3
    # torch 2.10: one more at the beginning, and one for the dropout of each micro-batch
    assert found == 3 + COPIES_EACH_DRAW * (1 + windows)


def test_a_model_that_draws_nothing_copies_no_state():
    assert states(run(Net(nn.Identity()), in_parts)) == (0, 0)


def seeded(hidden: Any) -> torch.Tensor:
    torch.manual_seed(1)
    torch.cuda.manual_seed_all(2)
    _random.manual_seed(3, hidden.device_mesh)
    return dropped(hidden)


def test_a_seed_makes_a_tracker_that_compares_nothing():
    """As in pipelines, whose stages have seeds of their own."""
    trace = run(Net(seeded), in_parts)
    assert sizes(trace) == sizes(run(Net(), in_parts))
    assert states(trace)[1] <= 1


@pytest.mark.parametrize(
    "draw",
    [
        torch.rand_like,
        torch.randn_like,
        lambda hidden: torch.bernoulli(torch.full_like(hidden, 0.5)),
        lambda hidden: torch.empty_like(hidden).uniform_(),
        lambda hidden: nn.functional.dropout(hidden.clone(), 0.5, inplace=True),
        lambda hidden: torch.randint_like(hidden, 3),
    ],
)
def test_what_is_drawn_in_the_shape_of_a_dtensor_has_that_of_its_local_part(draw):
    def between(hidden: torch.Tensor) -> torch.Tensor:
        return hidden * draw(hidden.detach())

    model = Net(between)
    assert sizes(run(model, in_parts)) == sizes(run(model, partial(in_parts, is_local=True)))


# -- initialization


def sharded(model: Any, *, initialize: Callable[[Any], Any] | None = None) -> None:
    for module in (model.up, model.down, model):
        fsdp.fully_shard(module)
    if initialize is None:
        return
    model.to_empty(device="cuda")
    for module in (model.up, model.down):
        initialize(module)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net(nn.Identity())


INITIALIZERS: list[Callable[[Any], Any]] = [
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.trunc_normal_,
    nn.init.xavier_uniform_,
    nn.init.xavier_normal_,
    nn.init.kaiming_uniform_,
    nn.init.kaiming_normal_,
    nn.init.ones_,
    nn.init.zeros_,
    partial(nn.init.constant_, val=0.5),
    lambda weight: nn.init.normal_(weight, generator=torch.Generator("cuda").manual_seed(1)),
    lambda weight: weight.data.bernoulli_(0.5),
    lambda weight: weight.data.copy_(torch.randn_like(weight)),
]


@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_shards_are_initialized_by_each_of_pytorchs_functions(initializer):
    initialize = partial(sharded, initialize=lambda module: initializer(module.weight))
    assert run(on_meta(), initialize).allocated() == run(on_meta(), sharded).allocated()


def test_a_model_on_meta_is_initialized_by_pytorchs_own_recipe():
    recipe = partial(sharded, initialize=lambda module: module.reset_parameters())
    trace, plain = run(on_meta(), recipe), run(on_meta(), sharded)
    assert trace.allocated() == plain.allocated()
    assert states(trace) == (0, 0)  # what dies before training is in no account


# -- nothing is left behind


@pytest.mark.parametrize("is_failing", [False, True])
@pytest.mark.parametrize("given", [None, "the user's"])
def test_the_process_keeps_its_own_tracker_and_each_run_has_one(
    monkeypatch, capsys, given, is_failing
):
    monkeypatch.setattr(_random, "_rng_tracker", given)
    methods = dict(vars(_random.OffsetBasedRNGTracker))
    base = dict(vars(_random._RNGStateTracker))

    def between(hidden: torch.Tensor) -> torch.Tensor:
        print(type(_random._rng_tracker).__name__)  # what a function appends is taken back
        if is_failing and _random._rng_tracker:
            raise ZeroDivisionError
        return dropped(hidden)

    model = Net(between)
    before = torch.get_rng_state()
    for _ in range(2):
        if is_failing:
            with pytest.raises(WorkloadError, match="ZeroDivisionError"):
                run(model, in_parts)
        else:
            run(model, in_parts)
        assert capsys.readouterr().out.split() == ["NoneType", "OffsetBasedRNGTracker"]
    assert _random._rng_tracker is given
    assert dict(vars(_random.OffsetBasedRNGTracker)) == methods
    assert dict(vars(_random._RNGStateTracker)) == base
    assert torch.equal(torch.get_rng_state(), before)
