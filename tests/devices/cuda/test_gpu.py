"""Everything above the card, on a card that is played on the CPU; and on a real one, if any."""

from dataclasses import replace
from math import log2
from queue import SimpleQueue

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autobatch
from autobatch import DoesNotFitError, UsageError, Workload, WorkloadError
from autobatch.devices.base import Run
from autobatch.devices.cuda.gpu import CudaGpu, describe
from autobatch.devices.cuda.runtime import CudaRuntime
from autobatch.memory.accounting import replay
from autobatch.memory.replay import Replay
from autobatch.memory.trace import Trace
from autobatch.support.units import GIB, MIB
from autobatch.tuning import ceiling
from autobatch.workload.sample import batch_builder
from tests.support.cuda_on_cpu import CudaOnCpu, installed

SAMPLE = (torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,)))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(8),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )


def workload(model=None, **options):
    given = {"model": model or cnn(), "batch": batch_builder(SAMPLE), "loss": cross_entropy}
    return Workload(**given | options)


def tune(card, **options):
    given = {"target": 4096, "cache": False, "headroom": 0.0} | options
    with installed(card):
        return autobatch.tune(given.pop("workload", None) or workload(), **given)


def run(card, n=2, steps=2, model=None, labelled=False, **options):
    gpu = CudaGpu(card, labelled=labelled)
    job = workload(model, **options)
    with gpu.hosting(job):
        return gpu.run(job, micro_batch=n, accumulation_steps=steps)


# What a run tells


def test_a_run_says_what_every_byte_is_for():
    model = cnn()
    result = run(CudaOnCpu(), n=8, model=model)
    elements = sum(p.numel() for p in model.parameters())
    account = result.trace.by_category(result.replay.peak_event)
    assert account["parameters"] == account["gradients"] == 4 * elements
    assert account["buffers"] == 4 * 32 + 8
    assert account["inputs"] == 8 * (3 * 32 * 32 * 4 + 8)
    assert account["activations"] > 8 * 16 * 32 * 32 * 4
    assert account["workspace"] == account["other"] == 0
    after_step = result.trace.by_category(len(result.trace.events) - 1)
    assert after_step["optimizer_state"] == 2 * 4 * elements
    assert (result.loss, result.optimizer, result.shortage) == ("user", "AdamW", None)
    assert result.window_seconds > 0


class Listed(torch.optim.Optimizer):
    """Keeps its state in a list, and scratch memory during a step."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.sums = []

    @torch.no_grad()
    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        scratch = [torch.empty_like(p) for p in parameters]
        self.sums = self.sums or [torch.zeros_like(p) for p in parameters]
        for parameter, total, room in zip(parameters, self.sums, scratch, strict=True):
            parameter.sub_(total.add_(torch.mul(parameter.grad, 2, out=room)))


def test_what_a_step_allocates_and_keeps_is_optimizer_state():
    model = cnn()
    result = run(CudaOnCpu(), model=model, optimizer=[Listed, torch.optim.SGD])
    state = [b for b in result.trace.blocks if b.category == "optimizer_state"]
    assert sorted(b.size_bytes for b in state) == sorted(p.nbytes for p in model.parameters())
    scratch = [b for b in result.trace.blocks if b.phase == "step" and b not in state]
    assert {b.category for b in scratch} == {"temporaries"}
    assert (result.optimizer, result.grown_bytes, result.notes) == ("Listed and SGD", 0, ())


def test_memory_that_grows_from_window_to_window_is_told():
    kept = []

    def loss(model, batch):
        kept.append(torch.zeros(1000))
        return cross_entropy(model, batch)

    assert run(CudaOnCpu(), steps=3, loss=loss).grown_bytes >= 3 * 4000


def test_ops_are_named_on_request():
    assert {block.op for block in run(CudaOnCpu()).trace.blocks} == {""}
    ops = {block.op for block in run(CudaOnCpu(), labelled=True).trace.blocks}
    assert {"aten::convolution", "aten::native_batch_norm"} & ops


def test_a_library_that_keeps_memory_of_its_own_is_seen():
    kept = []

    def loss(model, batch):
        if not kept:
            kept.append(torch.zeros(1000))
        return cross_entropy(model, batch)

    trace = run(CudaOnCpu(), loss=loss).trace
    assert [b.size_bytes for b in trace.blocks if b.category == "workspace"] == [4000]


def test_out_of_memory_is_a_value_and_leaves_the_allocator_as_it_was():
    card = CudaOnCpu(24 * MIB, context_bytes=0)
    before = card.stats()
    result = run(card, n=512)
    assert result.shortage.startswith("CUDA out of memory. Tried to allocate")
    assert card.ooms == 1
    assert not result.fits(2**40)
    assert result.trace.events  # up to the request that failed
    now = card.stats()
    assert (now.allocated_bytes, now.reserved_bytes) == (0, 0)
    assert now.peak_allocated_bytes == before.peak_allocated_bytes


def test_what_fits_only_after_a_retry_does_not_fit():
    trace = Trace(micro_batch=1, accumulation_steps=1, blocks=(), events=(), marks=())
    facts = {"seconds": 0.0, "loss": "user", "optimizer": "SGD", "notes": (), "trace": trace}
    peaks = {"peak_allocated_bytes": 5, "peak_reserved_bytes": 5, "peak_event": 0}
    calm = Run(replay=Replay(**peaks, alloc_retries=0, oom_event=None), **facts)
    retried = Run(replay=Replay(**peaks, alloc_retries=1, oom_event=None), **facts)
    assert calm.fits(5) and not calm.fits(4) and not retried.fits(100)
    assert not replace(calm, shortage="no room").fits(100)


def test_tensors_that_survive_a_run_are_reported():
    kept = SimpleQueue()  # no copy of it can be made

    def loss(model, batch):
        output = model(batch[0])
        kept.put(output)
        return F.cross_entropy(output, batch[1])

    warning = " ".join(run(CudaOnCpu(), loss=loss).notes)
    assert "still allocated after a run at micro-batch 2" in warning


def test_a_users_error_is_theirs_and_nothing_stays_on_the_card():
    card = CudaOnCpu()

    def loss(model, batch):
        held = model(batch[0])
        raise ValueError(f"labels of {held.shape}")

    with pytest.raises(WorkloadError, match="failed at micro-batch 2: ValueError: labels"):
        run(card, loss=loss)
    assert card.stats().allocated_bytes == 0


def test_a_model_that_is_compiled_runs_compiled():
    def loss(model, batch):
        assert type(model).__name__ == "OptimizedModule"
        return F.cross_entropy(model(batch[0]), batch[1])

    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    compiled = torch.compile(net, backend="eager")
    assert run(CudaOnCpu(), model=compiled, loss=loss).shortage is None


# The search on it


@pytest.mark.slow
def test_the_ceiling_takes_three_executions_and_no_oom_and_is_proven():
    card = CudaOnCpu(96 * MIB)
    plan = tune(card, prove=True)
    sizes = [trial.micro_batch for trial in plan.trials]
    proof = sizes.index(plan.ceiling + 1)
    assert plan.ceiling in sizes[:proof] and proof <= 3
    assert [trial.fits for trial in plan.trials[: proof + 1]] == [True] * proof + [False]
    assert plan.proven and plan.method == "trace model" and card.ooms == plan.ooms <= 1
    assert plan.ceiling_footprint.evidence == plan.footprint.evidence == "measured"
    assert plan.footprint.micro_batch == plan.micro_batch
    assert plan.micro_batch in sizes  # what is promised has run
    assert plan.budget_bytes == 80 * MIB
    assert all(trial.window_seconds for trial in plan.trials if not trial.oom)


@pytest.mark.slow
def test_without_proof_nothing_is_run_that_does_not_fit():
    card = CudaOnCpu(96 * MIB)
    plan = tune(card)
    assert card.ooms == 0 and all(trial.fits for trial in plan.trials)
    assert not plan.proven


def varying_scratch(name, shapes):
    """A convolution whose kernels choose another workspace for every other size."""
    if name != "aten::convolution":
        return 0
    n = shapes[0][0]
    return 4096 * n + (MIB if n % 2 else 0) if n % 3 else 0


@pytest.mark.slow
def test_scratch_memory_that_changes_with_the_size_does_not_end_the_model():
    card = CudaOnCpu(96 * MIB, scratch=varying_scratch)
    plan = tune(card, prove=True)
    assert plan.method == "trace model" and plan.proven
    assert len([t for t in plan.trials if t.micro_batch <= plan.ceiling]) <= 6
    assert sum(trial.oom for trial in plan.trials if trial.micro_batch <= plan.ceiling) == 0


@pytest.mark.slow
def test_a_size_that_runs_out_unforeseen_is_learned_from():
    def scratch(name, shapes):
        small = name != "aten::convolution" or shapes[0][0] < 100
        return 0 if small else 24_000 * shapes[0][0]

    card = CudaOnCpu(96 * MIB, scratch=scratch)
    plan = tune(card, prove=True)
    assert plan.method == "trace model" and plan.proven
    above = [trial for trial in plan.trials if trial.micro_batch > plan.ceiling + 1]
    assert 1 <= len(above) <= 2 and all(trial.oom for trial in above)
    assert plan.executions <= 8


@pytest.mark.slow
def test_a_smaller_size_that_needs_more_is_reported_and_not_planned():
    def scratch(name, shapes):
        if name != "aten::convolution":
            return 0
        return 60 * MIB if shapes[0][0] == 192 else 0

    plan = tune(CudaOnCpu(96 * MIB, scratch=scratch), target=384)
    assert plan.ceiling > 192  # of which two would have made the target
    assert (plan.micro_batch, plan.accumulation_steps, plan.effective_batch) == (128, 3, 384)
    assert any("memory is not monotone here: micro-batch 192" in w for w in plan.warnings)


@pytest.mark.slow
def test_traces_that_never_align_are_bisected_from_the_simulated_ceiling(monkeypatch):
    monkeypatch.setattr(ceiling, "SECONDS_BEYOND", 1e9)  # other programs may run beside this one

    class Shifty(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = cnn()

        def forward(self, images):
            parts = images.chunk(1 + len(images) % 5)
            return torch.cat([self.net(part) for part in parts])

    card = CudaOnCpu(64 * MIB)
    plan = tune(card, workload=workload(Shifty()))
    assert plan.method == "bisection"
    fits = {trial.micro_batch: trial.fits for trial in plan.trials}
    assert fits[plan.ceiling] and not fits[plan.ceiling + 1]
    # its memory is not monotone, so that lines through peaks mislead: no more than bisection
    assert plan.executions <= 2 * log2(4096)
    first_guess = plan.trials[2].micro_batch
    assert abs(first_guess - plan.ceiling) < plan.ceiling / 2


@pytest.mark.slow
def test_nothing_fits_says_by_how_much():
    with pytest.raises(DoesNotFitError, match="not even micro-batch 1 fits on rehearsed"):
        tune(CudaOnCpu(96 * MIB), headroom=0.99)
    with pytest.raises(DoesNotFitError, match="ran out of memory"):
        tune(CudaOnCpu(17 * MIB))


# The card


@pytest.mark.slow
def test_the_budget_leaves_out_context_and_other_processes():
    card = CudaOnCpu(300 * MIB, context_bytes=20 * MIB, others_bytes=180 * MIB)
    plan = tune(card, headroom=0.1)
    assert plan.budget_bytes == int(100 * MIB * 0.9)
    assert (plan.gpu.context_bytes, plan.others_bytes) == (20 * MIB, 180 * MIB)
    assert any("other processes hold 180 MiB" in warning for warning in plan.warnings)
    assert "- 180 MiB others) × (1 - 0.1 headroom) = 90.0 MiB" in str(plan)


@pytest.mark.slow
def test_the_processes_fraction_is_obeyed():
    plan = tune(CudaOnCpu(300 * MIB, allowed_bytes=64 * MIB), prove=True)
    assert plan.budget_bytes == plan.allowed_bytes == 64 * MIB
    assert "64.0 MiB allowed to the process × (1 - 0 headroom)" in str(plan)
    assert plan.proven


@pytest.mark.slow
def test_a_context_that_grows_while_kernels_load_takes_from_the_budget():
    card = CudaOnCpu(96 * MIB)
    grown = iter(range(1, 100))

    def scratch(name, shapes):
        if name == "aten::convolution" and card.context_bytes < 24 * MIB:
            card.context_bytes += next(grown) * 1024
        return 0

    card.scratch = scratch
    plan = tune(card)
    assert 16 * MIB < plan.gpu.context_bytes <= card.context_bytes
    assert plan.budget_bytes == 96 * MIB - plan.gpu.context_bytes
    assert plan.ceiling_footprint.peak_reserved_bytes <= plan.budget_bytes


@pytest.mark.slow
def test_a_neighbour_that_grows_during_the_probe_is_reported():
    card = CudaOnCpu(300 * MIB, others_bytes=MIB)
    calls = []

    def scratch(name, shapes):
        calls.append(name)
        if len(calls) == 50:
            card.others_bytes += 100 * MIB
        return 0

    card.scratch = scratch
    plan = tune(card)
    assert any("grew by 100 MiB during the probe" in warning for warning in plan.warnings)
    assert plan.others_bytes == 101 * MIB


@pytest.mark.slow
def test_a_driver_that_hides_processes_is_said_to():
    plan = tune(CudaOnCpu(96 * MIB, knows_own=False))
    assert any("does not say what this process holds" in warning for warning in plan.warnings)
    assert plan.budget_bytes == 80 * MIB


@pytest.mark.slow
def test_spilling_into_the_hosts_memory_is_not_believed():
    card = CudaOnCpu(64 * MIB, knows_own=False)
    card.allocator = type(card.allocator)()  # a driver that never says no
    plan = tune(card, prove=True)
    assert plan.budget_bytes == 48 * MIB
    assert plan.ceiling_footprint.peak_reserved_bytes <= 48 * MIB
    assert card.ooms == 0 and not plan.trials[3].fits


def test_a_recording_of_the_users_own_is_not_ended():
    card = CudaOnCpu()
    card.is_recording = True
    with pytest.raises(UsageError, match="isolate=True"):
        tune(card)


def test_a_known_card_keeps_its_figures_and_takes_the_drivers_capacity():
    spec = describe("NVIDIA H100 80GB HBM3", 85_000_000_000, (9, 0))
    assert (spec.name, spec.capacity_bytes) == ("NVIDIA H100 80GB HBM3", 85_000_000_000)
    assert spec.flops["bf16"] > 9e14
    unknown = describe("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4 * GIB, (8, 0))
    assert (unknown.capacity_bytes, unknown.compute_capability) == (4 * GIB, (8, 0))


# The cache of plans


@pytest.mark.slow
def test_a_second_tune_answers_without_running_anything(tmp_path):
    card, cache = CudaOnCpu(96 * MIB), tmp_path / "plan.json"
    first = tune(card, cache=cache)
    ran = card.calls
    second = tune(card, cache=cache)
    assert card.calls == ran
    assert (second.split, second.trials) == (first.split, first.trials)
    assert f"answered from {str(cache)!r}, the plan of" in second.notes[-1]
    third = tune(card, cache=cache, target=8192)
    assert card.calls > ran and third.target == 8192


@pytest.mark.slow
def test_a_plan_made_beside_smaller_neighbours_is_made_again(tmp_path):
    card, cache = CudaOnCpu(160 * MIB), tmp_path / "plan.json"
    tune(card, cache=cache)
    ran = card.calls
    card.others_bytes = 80 * MIB
    card.allocator = CudaOnCpu(160 * MIB, others_bytes=80 * MIB).allocator
    assert tune(card, cache=cache).others_bytes == 80 * MIB
    assert card.calls > ran


# On a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("limit", [2 * GIB, 4 * GIB])
def test_on_a_gpu_the_ceiling_is_exact(limit):
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        plan = autobatch.tune(workload(), target=2**16, headroom=0.0, prove=True, cache=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    before_proof = [t for t in plan.trials if t.micro_batch <= plan.ceiling]
    assert plan.proven and not any(trial.oom for trial in before_proof)
    assert len({trial.micro_batch for trial in before_proof}) <= 4


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_trace_replays_to_the_measured_peak():
    result = run(CudaRuntime(), n=64)
    simulated = replay(result.trace)
    assert abs(simulated.peak_reserved_bytes / result.replay.peak_reserved_bytes - 1) < 0.01


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_a_model_there_is_not_duplicated():
    model = cnn().cuda()
    gpu = CudaGpu(CudaRuntime())
    job = workload(model)
    before = torch.cuda.memory_allocated()
    with gpu.hosting(job):
        assert torch.cuda.memory_allocated() < before
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_an_oom_leaves_the_allocator_as_it_was():
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(GIB / torch.cuda.mem_get_info()[1])
    try:
        result = run(CudaRuntime(), n=2**15)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.shortage is not None
    assert torch.cuda.memory_allocated() == before


def test_the_window_of_a_plan_is_labelled_by_a_run_that_is_no_trial():
    card = CudaOnCpu()
    gpu = CudaGpu(card)
    job = workload()
    with gpu.hosting(job):
        trace = gpu.run(job, micro_batch=4, accumulation_steps=1).trace
        labelled = gpu.labelled(job, trace)

    assert {block.op for block in trace.blocks} == {""}
    assert [(b.size_bytes, b.category, b.phase) for b in labelled.blocks] == [
        (b.size_bytes, b.category, b.phase) for b in trace.blocks
    ]
    assert labelled.events == trace.events
    convolutions = [b for b in labelled.blocks if b.op == "aten::convolution"]
    names = {name for name, _ in job.model.named_modules()}
    assert convolutions
    assert {block.label.module for block in labelled.blocks} <= names
    assert all(block.label.module for block in convolutions)
    forward = next(b for b in convolutions if b.phase == "forward")
    assert (forward.label.shape, forward.label.dtype) == ((4, 16, 32, 32), "float32")
    assert forward.label.where.endswith(" cross_entropy")
    assert {b.label.where for b in labelled.blocks if b.phase in ("backward", "step")} == {""}


def test_a_trace_stays_as_it_is_where_the_run_that_labels_it_fails():
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) > limit:
            raise ValueError("only so often")
        return cross_entropy(model, batch)

    limit = 10**6
    gpu = CudaGpu(CudaOnCpu())
    job = workload(loss=loss)
    with gpu.hosting(job):
        trace = gpu.run(job, micro_batch=4, accumulation_steps=1).trace
        limit = 0
        assert gpu.labelled(job, trace) is trace
