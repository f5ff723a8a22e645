"""Rank 0 of GPUs that are not there: PyTorch's own FSDP2, checked against arithmetic."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import autobatch
from autobatch.advice.loop import training_loop
from autobatch.cli import main
from autobatch.devices.ddp_buckets import gradient_buckets
from autobatch.devices.virtual.backend import virtual_device
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import UsageError, WorkloadError
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.trace import Trace
from autobatch.plan.plan import Plan
from autobatch.records.progress import silent
from autobatch.report.content import summary
from autobatch.report.text import render
from autobatch.tuning.probe import Probe
from autobatch.tuning.question import question_of
from autobatch.workload.workload import Workload
from tests.support.cuda_on_cpu import CudaOnCpu, installed
from tests.support.plans import ragged_plan

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("this PyTorch was built without torch.distributed", allow_module_level=True)
fsdp = pytest.importorskip("torch.distributed.fsdp", reason="no FSDP2 in this PyTorch")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("no FSDP2 in this PyTorch", allow_module_level=True)

from autobatch.devices.virtual.sharding import dtensor_mode  # noqa: E402
from autobatch.workload.blocks import repeated_blocks  # noqa: E402

GPU = find_gpu("a100-40gb")
WIDTH, HIDDEN, LAYERS = 24, 100, 3
MIB = 2**20


class Layer(nn.Module):
    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Repeated layers between an embedding and a head; few sizes divide by the ranks."""

    def __init__(self, layers: int = LAYERS, *, recomputes: bool = False, hidden: int = HIDDEN):
        super().__init__()
        self.embed = nn.Linear(7, WIDTH)
        self.layers = nn.ModuleList(Layer(hidden=hidden) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 5)
        self.recomputes = recomputes

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recomputes else layer(x)
        return self.head(x)


def batch(n: int) -> torch.Tensor:
    return torch.zeros(n, 7)


def workload(model: nn.Module | None = None, **options) -> Workload:
    options = {"world_size": 4, "sharding": "fsdp"} | options
    return Workload(model=model or Net(), batch=options.pop("batch", batch), **options)


def run(model: nn.Module | None = None, *, n: int = 8, steps: int = 2, **options) -> Trace:
    device = VirtualGpu(GPU)
    return device.run(workload(model, **options), micro_batch=n, accumulation_steps=steps).trace


def largest(trace: Trace, *categories: str) -> int:
    """Most bytes of some categories alive at once."""
    live = most = 0
    for event in trace.events:
        block = trace.blocks[event if event >= 0 else ~event]
        if block.category in categories:
            live += block.size_bytes if event >= 0 else -block.size_bytes
            most = max(most, live)
    return most


def shard_bytes(module: nn.Module, ranks: int = 4, itemsize: int = 4) -> int:
    """A rank's share: FSDP2 pads the first dimension of every parameter to the ranks."""
    return sum(
        math.ceil(p.shape[0] / ranks) * math.prod(p.shape[1:]) * itemsize
        for p in module.parameters()
    )


def whole_bytes(module: nn.Module, ranks: int = 4, itemsize: int = 4) -> int:
    return ranks * shard_bytes(module, ranks, itemsize)


def policy(**options):
    """What users write: FSDP2 on each layer, then on the model."""

    def shard(model):
        for layer in model.layers:
            fsdp.fully_shard(layer, **options)
        fsdp.fully_shard(model, **options)

    return shard


def bf16(**options):
    return policy(mp_policy=fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, **options))


# -- the arithmetic


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_parameters_gradients_and_adam_state_are_a_ranks_share_with_padding(ranks):
    model = Net()
    trace = run(model, world_size=ranks)
    share = shard_bytes(model, ranks)
    assert largest(trace, "parameters") == share
    assert largest(trace, "gradients") == share
    assert largest(trace, "optimizer_state") == 2 * share


def test_a_model_that_divides_by_the_ranks_costs_each_its_part_exactly():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3)))
    trace = run(model, world_size=8, batch=lambda n: torch.zeros(n, 64))
    weights = sum(p.nbytes for p in model.parameters())
    assert largest(trace, "parameters") == weights // 8


def test_the_peak_is_at_least_the_shards_and_the_largest_layer_whole():
    model = Net(hidden=4000)
    trace = run(model, n=1)
    sharded, layer = shard_bytes(model), whole_bytes(model.layers[0])
    peak = max(trace.allocated())
    assert peak >= 4 * sharded + layer
    # and no more than that, the gathered layers and gradients on their way, and small change
    assert peak <= 4 * sharded + 5 * layer + 2 * whole_bytes(model.embed) + 20 * MIB


def test_layers_are_gathered_one_after_the_other_and_freed():
    model = Net(layers=6)
    trace = run(model, n=1, steps=1)
    layer = whole_bytes(model.layers[0])
    backward = next(mark.event for mark in trace.marks if mark.phase == "backward")
    gathered = [trace.by_category(event)["temporaries"] for event in range(backward)]
    # the gathered layer, the buffer of its all-gather and of the one before; the root's own
    root = whole_bytes(model.embed) + whole_bytes(model.head)
    assert 2 * layer <= max(gathered) <= 3 * layer + 2 * root + 4 * WIDTH * HIDDEN


def test_collectives_take_their_buffers_on_streams_of_their_own():
    model = Net()
    trace = run(model)
    layer = model.layers[0]
    sizes = {(block.size_bytes, block.stream) for block in trace.blocks}
    assert (whole_bytes(layer), 1) in sizes  # all-gather
    assert (whole_bytes(layer), 0) in sizes  # input of the reduce-scatter
    assert (shard_bytes(layer), 2) in sizes  # its output: the gradients
    gradients = {block.stream for block in trace.blocks if block.category == "gradients"}
    assert gradients == {2}


def test_buffers_of_collectives_are_temporaries_and_whole_parameters_are_never_counted():
    model = Net()
    trace = run(model)
    by_size = {b.category for b in trace.blocks if b.size_bytes == whole_bytes(model.layers[0])}
    assert by_size == {"temporaries"}
    first = next(mark.event for mark in trace.marks if mark.phase == "inputs")
    assert trace.allocated()[first - 1] == shard_bytes(model)


def test_every_category_is_zero_or_more_and_every_block_is_freed_once():
    trace = run()
    live = set()
    for event in trace.events:
        if event >= 0:
            assert event not in live
            live.add(event)
        else:
            live.remove(~event)


def test_buffers_of_modules_stay_whole():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2)))
    trace = run(model, batch=lambda n: torch.zeros(n, 8))
    assert largest(trace, "buffers") == sum(b.nbytes for b in model.buffers())


def frozen(model: nn.Module, first: int) -> nn.Module:
    """Freeze the first children of a model; those within its list of layers count, too."""
    for module in [model.embed, *model.layers][:first]:
        module.requires_grad_(False)
    return model


@pytest.mark.parametrize(("n", "still"), [(1, 0), (64, 0), (4096, 0), (64, 1), (64, 3), (4096, 2)])
def test_the_peak_is_that_of_pytorchs_own_tracker_of_fsdp2(n, still):
    """`FSDPMemTracker` watches FSDP2 itself on CPU tensors: another way to the same figure."""
    tools = pytest.importorskip("torch.distributed._tools.fsdp2_mem_tracker")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed import fake_pg  # noqa: F401

    def loss(model, inputs):
        return model(inputs).sum()

    def sharded():
        model = frozen(Net(), still)
        policy(mesh=init_device_mesh("cpu", (4,)))(model)
        return model, torch.optim.AdamW(model.parameters(), foreach=True)

    def update(model, optimizer, inputs):
        loss(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    trace = run(frozen(Net(), still), n=n, steps=1, loss=loss)
    peak = trace.peak_event()
    ours = trace.allocated()[peak] - trace.by_category(peak)["workspace"]

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=4)
    try:
        # DTensor infers shapes once from tensors of the whole model: up to torch 2.11 the tracker
        # would count them
        first, optimizer = sharded()
        update(first, optimizer, batch(n))
        model, optimizer = sharded()
        tracker, inputs = tools.FSDPMemTracker(model, optimizer), batch(n)
        tracker.track_inputs((inputs,))
        with tracker:
            for _ in range(2):
                update(model, optimizer, inputs)
                tracker.reset_mod_stats()
        theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    finally:
        dist.destroy_process_group()
    # on the CPU, theirs count too
    step_counters = 4 * sum(p.requires_grad for p in frozen(Net(), still).parameters())
    micro_batch_scaling = 4  # our window divides the loss by its steps
    assert 0 <= ours + step_counters - theirs <= micro_batch_scaling


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "optimizer": torch.optim.Adagrad}])
def test_lists_of_shards_take_the_memory_that_dtensor_itself_would_take(options, monkeypatch):
    quick = run(**options)
    monkeypatch.setattr(dtensor_mode, "_local_lists", lambda *call: None)
    assert run(**options) == quick


# -- options of the user's


def test_mixed_precision_gathers_in_half_the_bytes_and_keeps_shards_in_full():
    model = Net()
    trace = run(model, sharding=bf16(reduce_dtype=torch.float32))
    layer = model.layers[0]
    sizes = {(block.size_bytes, block.stream) for block in trace.blocks}
    assert (whole_bytes(layer, itemsize=2), 1) in sizes
    assert (whole_bytes(layer), 1) not in sizes
    assert largest(trace, "parameters", "gradients") == 2 * shard_bytes(model)


def test_parameters_that_are_not_freed_after_forward_stay_whole():
    model = Net()
    freed, kept = run(model, n=1), run(model, n=1, sharding=policy(reshard_after_forward=False))
    layers = sum(map(whole_bytes, model.layers))
    backward = [next(m.event for m in t.marks if m.phase == "backward") for t in (freed, kept)]
    alive = [
        t.by_category(e - 1)["temporaries"] for t, e in zip((freed, kept), backward, strict=True)
    ]
    assert alive[1] - alive[0] == layers


def test_offloaded_shards_are_not_on_the_gpu():
    trace = run(sharding=policy(offload_policy=fsdp.CPUOffloadPolicy(pin_memory=False)))
    assert largest(trace, "parameters", "gradients", "optimizer_state") == 0


def test_shards_may_be_replicated_over_a_mesh_of_the_users():
    from torch.distributed.device_mesh import init_device_mesh

    def shard(model):
        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("replicate", "shard"))
        for layer in model.layers:
            fsdp.fully_shard(layer, mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)

    model = Net()
    assert largest(run(model, sharding=shard, world_size=8), "parameters") == shard_bytes(model, 4)


def test_fully_shard_itself_is_a_policy():
    model = Net()
    trace = run(model, sharding=fsdp.fully_shard)
    assert max(block.size_bytes for block in trace.blocks if block.stream) == whole_bytes(model)


def test_activation_checkpointing_saves_activations_of_all_layers_but_one():
    plain, recomputing = (run(Net(8, recomputes=r), n=4096) for r in (False, True))
    assert largest(recomputing, "activations") < 0.5 * largest(plain, "activations")
    assert largest(recomputing, "parameters") == largest(plain, "parameters")


@pytest.mark.parametrize("options", [{"clip_norm": 1.0}, {"autocast": "fp16", "clip_norm": 0.5}])
def test_clipping_and_loss_scaling_work_on_shards(options):
    model = Net()
    assert largest(run(model, **options), "optimizer_state") == 2 * shard_bytes(model)


@pytest.mark.parametrize(("autocast", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_autocast_keeps_copies_of_the_weights_and_says_so(autocast, dtype):
    device = VirtualGpu(GPU)
    found = device.run(workload(autocast=autocast), micro_batch=8, accumulation_steps=1)
    policy = f"MixedPrecisionPolicy(param_dtype=torch.{dtype})"
    assert any(policy in warning for warning in found.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (partial(torch.optim.SGD, lr=0.1), 0),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1),
        (torch.optim.Adagrad, 1),
        (torch.optim.AdamW, 2),
    ],
)
def test_an_optimizer_instance_is_copied_over_the_shards_with_its_state(make, copies):
    model = Net()
    optimizer = make(model.parameters())
    model(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    held = [value for state in optimizer.state.values() for value in state.values()]
    trace = run(model, optimizer=optimizer)
    assert largest(trace, "optimizer_state") == copies * shard_bytes(model)
    assert held == [value for state in optimizer.state.values() for value in state.values()]
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


class Factored(torch.optim.Optimizer):
    """Keeps the mean of each row, as Adafactor does: no tensor of a parameter's shape."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            rows = self.state[parameter].setdefault("rows", parameter.flatten(1).mean(1))
            parameter.add_(rows.view(-1, *([1] * (parameter.dim() - 1))), alpha=0)


def test_state_of_another_shape_is_made_anew():
    model = nn.Sequential(*(nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU()) for _ in range(2)))
    for module in model:
        module[0].register_parameter("bias", None)
    optimizer = Factored(model.parameters())
    optimizer.step()
    trace = run(model, optimizer=optimizer, batch=lambda n: torch.zeros(n, 8, 4))
    assert largest(trace, "optimizer_state") == 2 * 8 // 4 * 4


def test_a_window_of_the_users_runs_on_the_shards():
    def window(model, optimizer, batches):
        for inputs in batches:
            model(inputs).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model = Net()
    assert largest(run(model, window=window), "gradients") == shard_bytes(model)


# -- DistributedDataParallel


@pytest.mark.parametrize("options", [{"sharding": None}, {"sharding": "ddp"}])
def test_ddp_adds_buckets_of_all_gradients(options):
    model = Net()
    weights = sum(p.nbytes for p in model.parameters())
    alone, ranked = run(model, world_size=1, sharding=None), run(model, **options)
    assert largest(alone, "gradients") == weights
    assert largest(ranked, "gradients") == 2 * weights
    assert largest(ranked, "parameters") == weights


@pytest.mark.slow
def test_gradients_in_ddps_buckets_take_nothing_more_once_they_are_averaged():
    model = Net()
    weights = sum(p.nbytes for p in model.parameters())
    beside = run(model, sharding="ddp")
    inside = run(model, sharding="ddp", gradient_as_bucket_view=True)
    assert largest(inside, "gradients") <= largest(beside, "gradients") == 2 * weights
    step = max(mark.event for mark in inside.marks if mark.phase == "step")
    before = inside.events[:step]
    alive = {event for event in before if event >= 0} - {~event for event in before if event < 0}
    blocks = [inside.blocks[at] for at in alive]
    assert sum(b.size_bytes for b in blocks if b.category == "gradients") == weights


def test_ddp_buckets_have_the_size_of_the_wrapper():
    class Wrapper(nn.Module):
        gradient_as_bucket_view = False
        bucket_bytes_cap = 4 * HIDDEN * WIDTH

        def __init__(self, module):
            super().__init__()
            self.module = module

    model = Net()
    buckets = gradient_buckets(workload(Wrapper(model), sharding=None), model).tensors
    assert len(buckets) > 3
    assert sum(bucket.nbytes for bucket in buckets) == sum(p.nbytes for p in model.parameters())
    assert gradient_buckets(workload(Wrapper(model)), model).tensors == []  # FSDP2 takes its place


# -- which modules are blocks


def names(model: nn.Module) -> list[str]:
    blocks = set(repeated_blocks(model))
    return [name for name, module in model.named_modules() if module in blocks]


def stage(depth: int) -> nn.Module:
    return nn.Sequential(*(Layer() for _ in range(depth)))


def test_blocks_are_members_of_module_lists():
    assert names(Net()) == ["layers.0", "layers.1", "layers.2"]
    assert names(Net(layers=1)) == []


def test_blocks_are_in_the_stages_of_a_sequential():
    assert names(nn.Sequential(stage(2), stage(3))) == ["0.0", "0.1", "1.0", "1.1", "1.2"]
    assert names(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))) == []


def test_a_small_stack_inside_of_a_block_does_not_take_its_place():
    class Wide(Layer):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    assert names(nn.Sequential(Wide(), Wide())) == ["0", "1"]


def test_blocks_may_stand_side_by_side():
    model = nn.Module()
    model.first, model.second = Layer(), Layer()
    assert names(model) == ["first", "second"]


def test_blocks_of_transformers_are_those_that_it_does_not_split():
    model = Net()
    model._no_split_modules = ["Linear"]
    assert "layers.0.up" in names(model) and "layers.0" not in names(model)


def test_a_block_that_shares_a_parameter_with_the_rest_is_left_to_the_root():
    model = Net()
    model.head = nn.Linear(HIDDEN, WIDTH, bias=False)
    model.head.weight = model.layers[1].down.weight
    assert names(model) == ["layers.0", "layers.2"]


def test_a_model_without_blocks_is_one_unit_and_says_so():
    model = nn.Linear(7, 5)
    device = VirtualGpu(GPU)
    found = device.run(workload(model), micro_batch=2, accumulation_steps=1)
    assert any("no repeated blocks" in warning for warning in found.notes)


# -- nothing is left behind


def state_of_the_process() -> tuple[object, ...]:
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    name = virtual_device().type  # registers the device, which a process does once
    return (
        dist.is_initialized(),
        sys.excepthook,
        torch.UntypedStorage.resize_,
        _fsdp_param_group.foreach_reduce,
        ShardingPropagator._propagate_tensor_meta_non_cached,
        torch.get_rng_state().tolist(),
        dict(vars(getattr(torch, name))),
    )


def fails(model):
    raise RuntimeError("my policy is broken")


@pytest.mark.parametrize("sharding", ["fsdp", policy(), fails])
def test_model_process_and_random_state_are_as_before(sharding):
    model = Net().eval()
    parameters = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in parameters.items()}
    before = state_of_the_process()
    if sharding is fails:
        with pytest.raises(WorkloadError, match="RuntimeError: my policy is broken"):
            run(model, sharding=sharding)
    else:
        run(model, sharding=sharding)
    assert state_of_the_process() == before
    assert type(model) is Net and not model.training
    assert all(type(layer) is Layer for layer in model.layers)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, values[name]) and parameter.grad is None


def test_a_process_group_of_the_users_is_left_alone():
    from torch.testing._internal.distributed import fake_pg  # noqa: F401

    dist.init_process_group("fake", store=dist.HashStore(), rank=1, world_size=2)
    hook = sys.excepthook
    try:
        with pytest.raises(UsageError, match="rank 1 of 2 in a process group of its own"):
            run()
        run(sharding="ddp")
        assert (dist.get_rank(), dist.get_world_size(), sys.excepthook) == (1, 2, hook)
    finally:
        dist.destroy_process_group()


# -- the answer


def on_a_card(capacity_mib: int):
    return dataclasses.replace(GPU, capacity_bytes=capacity_mib * MIB, context_bytes=0)


@pytest.mark.parametrize("sharding", ["fsdp", bf16()])
def test_the_ceiling_is_what_direct_execution_finds(sharding):
    card = on_a_card(80)
    asked = workload(Net(hidden=2000), sharding=sharding)
    plan = autobatch.tune(asked, target=100_000, gpu=card, headroom=0.0, cache=False)
    assert plan.ceiling is not None and plan.ceiling > 100
    assert plan.method == "trace model"

    def peak(n: int) -> int:
        found = VirtualGpu(card).run(asked, micro_batch=n, accumulation_steps=2)
        return found.replay.peak_reserved_bytes

    assert peak(plan.ceiling) <= plan.budget_bytes < peak(plan.ceiling + 1)


def test_a_plan_names_its_ranks_and_round_trips(tmp_path):
    plan = autobatch.tune(
        Net(), sample=batch(2), target=64, gpu=GPU, world_size=8, sharding="fsdp", clip_norm=1.0
    )
    assert (plan.world_size, plan.sharding, plan.effective_batch) == (8, "fsdp", 64)
    assert plan.footprint.parameters_bytes == shard_bytes(Net(), 8)
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert any("NCCL" in note for note in plan.notes)
    assert "8 GPUs, FSDP2" in " ".join(render(summary(plan)).split())
    assert "DistributedDataParallel" not in training_loop(plan)
    compile(training_loop(plan), "loop", "exec")


@pytest.mark.parametrize("windows", [((4, 4), (4, 4)), ((4, 3), (3, 3))])
def test_the_pasted_loop_of_a_sharded_plan_reduces_in_every_micro_batch(windows):
    plan = ragged_plan(sum(map(sum, windows)), windows)
    plan = dataclasses.replace(plan, sharding="fsdp")
    loop = training_loop(plan)
    assert "no_sync" not in loop and "nullcontext" not in loop
    compile(loop, "loop", "exec")


def test_one_gpu_needs_no_sharding_and_says_nothing_of_it():
    plan = autobatch.tune(Net(), sample=batch(2), target=64, gpu=GPU)
    assert plan.sharding is None
    assert not any("NCCL" in note for note in plan.notes)


def test_predict_takes_ranks_and_sharding():
    model = Net()
    ask = partial(autobatch.predict, model, micro_batch=8, sample=batch(2), gpu=GPU)
    assert ask().parameters_bytes == sum(p.nbytes for p in model.parameters())
    assert ask(world_size=8, sharding="fsdp").parameters_bytes == shard_bytes(model, 8)
    assert ask(world_size=8).gradients_bytes > ask().gradients_bytes


def test_a_workload_brings_its_own_ranks():
    asked = workload(world_size=8, sharding=policy())
    plan = autobatch.tune(asked, target=64, gpu=GPU, cache=False)
    assert (plan.world_size, plan.sharding) == (8, "custom")
    with pytest.raises(UsageError, match="at least 8"):
        autobatch.tune(asked, target=7, gpu=GPU)


def test_ranks_and_sharding_are_part_of_what_a_cached_plan_answers():
    def key(**options):
        probe = Probe(
            device=VirtualGpu(GPU),
            workload=workload(**options),
            accumulation_steps=2,
            progress=silent,
        )
        return str(question_of(probe, target=8, prove=False))

    keys = [
        key(),
        key(world_size=8),
        key(sharding="ddp"),
        key(sharding=policy()),
        key(sharding=bf16()),
        key(sharding=policy(reshard_after_forward=False)),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[4] == key(sharding=bf16())


@pytest.mark.slow
def test_the_command_line_takes_ranks_and_sharding(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "from autobatch import Workload\n"
        "def make():\n"
        "    layers = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())"
        " for _ in range(2)]\n"
        "    model = torch.nn.Sequential(*layers)\n"
        "    return Workload(model=model, batch=lambda n: torch.zeros(n, 8))\n"
    )
    spec = f"{tmp_path / 'net.py'}:make"
    ranks = ["--gpu", "t4", "--world-size", "4", "--sharding", "fsdp", "--json", "-"]
    assert main(["probe", spec, "--target", "64", *ranks]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["answer"]["world_size"], plan["sharding"]) == (4, "fsdp")
    assert main(["predict", spec, "--micro-batch", "2", *ranks]) == 0
    assert json.loads(capsys.readouterr().out)["parameters_bytes"] == 2 * (64 + 8) * 4 // 4


# -- what cannot be asked


@pytest.mark.parametrize("ranks", [0, -1, 1.5])
def test_ranks_are_a_whole_number(ranks):
    with pytest.raises(UsageError, match="world_size is"):
        autobatch.predict(Net(), micro_batch=1, sample=batch(2), gpu=GPU, world_size=ranks)


def test_an_unknown_sharding_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match="sharding is 'zero3': use 'ddp', 'fsdp'"):
        workload(sharding="zero3")


def test_a_policy_that_shards_nothing_is_refused():
    with pytest.raises(UsageError, match="fully_shard to no module"):
        run(sharding=lambda model: None)


def test_fsdp_on_the_gpu_in_the_machine_is_refused_and_names_the_way_out():
    for asked in ("fsdp", policy()):
        with (
            installed(CudaOnCpu()),
            pytest.raises(UsageError, match=r"simulated only.*gpu=.a100-40gb"),
        ):
            autobatch.tune(workload(sharding=asked), target=64)


def test_an_fsdp2_that_is_built_otherwise_is_a_clear_error(monkeypatch):
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    monkeypatch.delattr(_fsdp_param_group, "foreach_reduce")
    with pytest.raises(UsageError, match=r"FSDP2 of torch .*foreach_reduce"):
        run()
    assert not dist.is_initialized()


@pytest.mark.slow
def test_a_transformers_model_is_sharded_by_its_decoder_layers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
        max_position_embeddings=64,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    plan = autobatch.tune(
        model, target=256, gpu=on_a_card(256), world_size=8, sharding="fsdp", autocast="bf16"
    )
    assert plan.ceiling is not None
    assert plan.ceiling_footprint.parameters_bytes == shard_bytes(model, 8)
    assert len(repeated_blocks(model)) == 4
