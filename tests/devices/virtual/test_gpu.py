"""The user's code runs unmodified on a GPU that is not there, and the arithmetic comes out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import trace_rules
from torch.utils.checkpoint import checkpoint

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import UsageError, WorkloadError
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.trace import Trace
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from tests.support.seen import Seen
from tests.support.simulated import (
    WIDTH,
    largest,
    mlp,
    nbytes,
    ops,
    run,
)


def test_parameters_gradients_and_adam_state_are_one_one_and_two_times_the_weights():
    model = mlp()
    trace = run(model)
    assert largest(trace, "parameters") == nbytes(model)
    assert largest(trace, "gradients") == nbytes(model)
    assert largest(trace, "optimizer_state") == 2 * nbytes(model)


def test_frozen_weights_have_no_gradients_and_no_optimizer_state():
    model = mlp()
    model[0].requires_grad_(False)
    trace = run(model)
    assert largest(trace, "gradients") == nbytes(model[2])
    assert largest(trace, "optimizer_state") == 2 * nbytes(model[2])


def test_gradients_wait_in_memory_only_when_accumulating():
    def live_gradients_when_forward_ends(trace: Trace) -> int:
        backward = [mark for mark in trace.marks if mark.phase == "backward"][-1]
        return trace.by_category(backward.event - 1)["gradients"]

    model = mlp()
    assert live_gradients_when_forward_ends(run(model, steps=1)) == 0
    assert live_gradients_when_forward_ends(run(model, steps=2)) == nbytes(model)


@pytest.mark.parametrize(
    ("make", "state", "temporaries"),
    [
        (partial(torch.optim.SGD, lr=0.1), 0, 0),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1, 0),
        (torch.optim.AdamW, 2, 1),
        (partial(torch.optim.AdamW, fused=True), 2, 0),
        (torch.optim.RMSprop, 1, 1),
        (torch.optim.Adagrad, 1, 2),
    ],
)
def test_an_optimizer_takes_the_state_and_temporaries_of_its_cuda_default(make, state, temporaries):
    model = nn.Linear(WIDTH, 1024, bias=False)
    trace = run(model, optimizer=make)
    # the fused form keeps its step counter on the GPU
    assert largest(trace, "optimizer_state") - state * nbytes(model) in (0, 4)
    steps = [mark.event for mark in trace.marks if mark.phase == "step"]
    peak = max(trace.by_category(e)["temporaries"] for e in range(steps[-1], len(trace.events)))
    before = trace.by_category(steps[-1] - 1)["temporaries"]
    assert round((peak - before) / nbytes(model)) == temporaries


def test_fp16_runs_through_a_grad_scaler_and_clipping():
    trace = run(mlp(), autocast="fp16", clip_norm=1.0)
    assert "aten::_foreach_norm.Scalar" in ops(trace)
    assert largest(trace, "optimizer_state") == 2 * nbytes(mlp())


class Blocks(nn.Module):
    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.blocks = nn.ModuleList(mlp() for _ in range(6))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_keeps_one_block_of_activations(reentrant):
    sample = torch.zeros(2, WIDTH, requires_grad=reentrant)
    plain = largest(run(Blocks(None), n=512), "activations")
    saved = largest(run(Blocks(reentrant), n=512, sample=sample), "activations")
    assert saved < plain / 2


def test_the_gradient_that_a_backward_pass_begins_with_is_no_activation():
    trace = run(mlp())
    made = [block for block in trace.blocks if block.op.startswith("aten::ones_like")]
    assert {(block.category, block.phase) for block in made} == {("temporaries", "backward")}
    assert not any(b.category == "activations" and b.phase == "backward" for b in trace.blocks)


def test_what_the_forward_pass_of_another_loss_keeps_is_activations():
    def window(model, optimizer, batches):
        for batch in batches:
            for _ in range(2):
                model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    twice = run(mlp(), optimizer=torch.optim.AdamW, window=window)
    again = [b for b in twice.blocks if b.category == "activations" and b.phase == "backward"]
    first = [b for b in twice.blocks if b.category == "activations" and b.phase == "forward"]
    assert first and sorted(b.op for b in again) == sorted(b.op for b in first)


def test_a_compiled_model_is_simulated_through_its_eager_original():
    model = torch.compile(mlp())
    workload = Workload(model=model, batch=batch_builder(torch.zeros(2, WIDTH)))
    ran = VirtualGpu(find_gpu("t4")).run(workload, micro_batch=4, accumulation_steps=1)
    assert "eager original" in ran.notes[0]
    assert largest(ran.trace, "parameters") == nbytes(mlp())


def test_gradients_of_gradients_run():
    def penalty(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        batch = batch.detach().requires_grad_()
        value = model(batch).sum()
        (gradient,) = torch.autograd.grad(value, batch, create_graph=True)
        return value + gradient.square().sum()

    assert largest(run(mlp(), loss=penalty), "gradients") == nbytes(mlp())


def test_the_evaluation_step_runs_without_gradients_in_eval_mode():
    modes = Seen()

    def evaluate(model: nn.Module, batch: torch.Tensor) -> None:
        modes.append((model.training, model(batch).requires_grad))

    trace = run(mlp(), evaluate=evaluate)
    assert modes == [(False, False)]
    assert trace.marks[-1].phase == "evaluate"


def test_inputs_have_a_category_and_follow_the_micro_batch():
    assert largest(run(mlp(), n=16), "inputs") == 2 * 16 * WIDTH * 4  # the old and the new batch


def test_a_model_of_70_billion_parameters_needs_no_memory():
    with torch.device("meta"):
        layers = [nn.Linear(32_768, 32_768, bias=False) for _ in range(65)]
        model = nn.Sequential(*layers)
    trace = run(model, sample=torch.zeros(1, 32_768), n=2)
    assert largest(trace, "parameters") == 65 * 2**30 * 4


def test_the_settings_of_the_allocator_that_the_run_would_have_are_obeyed(monkeypatch):
    model, sample = nn.Linear(1024, 1024), torch.zeros(2, 1024)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    workload = Workload(model=model, batch=batch_builder(sample), optimizer=torch.optim.SGD)

    def reserved():
        device = VirtualGpu(find_gpu("t4"))
        return device.run(workload, micro_batch=2, accumulation_steps=1).replay.peak_reserved_bytes

    usual = reserved()
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "large_segment_size_mb:10")
    assert reserved() < usual
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:maybe")
    with pytest.raises(UsageError, match="expandable_segments:maybe"):
        reserved()


def test_an_op_that_runs_functions_is_refused_in_one_line() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (model(x),)).mean()

    workload = Workload(model=nn.Linear(4, 4), batch=lambda n: torch.zeros(n, 4), loss=loss)
    with pytest.raises(WorkloadError, match=r"micro-batch 2: cond runs functions as one op .*can$"):
        VirtualGpu(find_gpu("t4")).run(workload, micro_batch=2, accumulation_steps=1)


def test_what_dynamo_knows_of_pytorch_is_not_learned_in_a_simulation() -> None:
    trace_rules.clear_lru_cache()  # as the beginning of a process group does
    test_an_op_that_runs_functions_is_refused_in_one_line()
    known = trace_rules.get_torch_obj_rule_map()
    assert {torch.nested.nested_tensor, torch.cuda.is_available} <= known.keys()
