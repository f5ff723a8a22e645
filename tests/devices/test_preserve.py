"""Nothing of the user's changes, whatever happens: on every kind of device."""

import contextlib
import os
import signal

import numpy as np
import pytest
import torch

import autobatch
from autobatch import DoesNotFitError, GpuSpec, UsageError, WorkloadError
from autobatch.devices.cuda import offload as shelter
from autobatch.devices.cuda.runtime import CudaRuntime
from autobatch.support.units import MIB
from tests.support.busy import lm_loss, state_of, trained
from tests.support.cuda_on_cpu import CudaOnCpu, installed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")


def interrupt(progress):
    if progress.executions == 1:
        raise KeyboardInterrupt


OUTCOMES = {
    "success": ({}, None, None),
    "nothing fits": ({"headroom": 0.9999999}, None, DoesNotFitError),
    "bad request": ({"target": 0}, None, UsageError),
    "loss without gradient": (
        {"loss": lambda model, batch: model(batch).sum().detach()},
        None,
        WorkloadError,
    ),
    "model raises": ({}, RuntimeError("broken"), WorkloadError),
    "out of memory": ({}, torch.OutOfMemoryError("CUDA out of memory."), DoesNotFitError),
    "interrupted between executions": ({"progress": interrupt}, None, KeyboardInterrupt),
    "interrupted inside the model": ({}, KeyboardInterrupt(), KeyboardInterrupt),
    "exits inside the model": ({}, SystemExit(3), SystemExit),
}
SIMULATED = GpuSpec(name="card", capacity_bytes=100 * MIB)


@contextlib.contextmanager
def device(kind):
    """Give the arguments of `tune` for a kind of device, and what its allocator counts."""
    if kind == "simulated":
        yield {"gpu": SIMULATED, "autocast": "fp16"}, lambda: None
    elif kind == "rehearsed":
        with installed(CudaOnCpu(32 * MIB, context_bytes=2 * MIB)) as card:
            card.touch(5 * MIB)
            yield {}, card.stats
    else:
        card = CudaRuntime()
        card.touch(50 * MIB)
        card.empty_cache()
        yield {"autocast": "fp16", "target": 64}, card.stats


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize(
    "kind", ["simulated", "rehearsed", pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])]
)
def test_nothing_of_the_users_changes_after(kind, outcome):
    options, fail_with, expected = OUTCOMES[outcome]
    if kind == "simulated" and outcome == "out of memory":
        expected = WorkloadError  # a simulation has no memory to run out of
    model, optimizer, hook_calls = trained("cuda" if kind == "gpu" else "cpu")
    model.fail_with = fail_with
    sample = torch.arange(18).reshape(6, 3)
    with device(kind) as (arguments, stats):
        before, hooks_before = state_of(model, optimizer, sample), list(hook_calls)
        counted = stats()
        given = {"target": 512, "loss": lm_loss} | arguments | options

        def run():
            return autobatch.tune(model, sample=sample, optimizer=optimizer, clip_norm=1.0, **given)

        if expected is None:
            assert run().micro_batch
        else:
            with pytest.raises(expected):
                run()
        after = state_of(model, optimizer, sample)
        for part in before:
            assert after[part] == before[part], part
        assert hook_calls[: len(hooks_before)] == hooks_before
        if counted is not None and outcome != "bad request":
            now = stats()
            assert now.allocated_bytes == counted.allocated_bytes
            assert now.peak_allocated_bytes == counted.peak_allocated_bytes
    model.fail_with = None
    place = next(model.parameters()).device
    lm_loss(model, sample.to(place)).backward()  # and training simply goes on
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_what_is_on_the_card_waits_in_host_memory_and_keeps_its_aliases():
    base = torch.arange(12.0)
    module = torch.nn.Linear(3, 4)
    module.weight = torch.nn.Parameter(base.view(4, 3))
    view = base[2:5]
    module.weight.grad = torch.ones(4, 3)
    hut = shelter.HostOffload(torch.device("cpu"))
    stand_in = hut.note(module.weight, torch.device("meta"))
    assert (stand_in.is_meta, stand_in.shape) == (True, (4, 3))
    hut.offload()
    assert base.untyped_storage().nbytes() == 0
    assert module.weight.grad.untyped_storage().nbytes() == 0
    assert hut.bytes_held == 12 * 4 * 2
    copied = hut.copy_of(module.weight, torch.device("cpu"))
    assert copied.tolist() == torch.arange(12.0).view(4, 3).tolist()
    hut.restore()
    assert base.tolist() == list(range(12)) and view.tolist() == [2, 3, 4]
    assert module.weight.grad.sum() == 12
    view.zero_()
    assert module.weight.detach()[0, 2] == 0  # still one memory


def test_a_host_without_room_is_told_before_anything_moves(monkeypatch):
    weight = torch.ones(1000)
    hut = shelter.HostOffload(torch.device("cpu"))
    hut.note(weight, torch.device("meta"))
    monkeypatch.setattr(shelter, "free_host_bytes", lambda: 3999)
    with pytest.raises(WorkloadError, match=r"3\.91 KiB on the GPU"):
        hut.offload()
    assert weight.sum() == 1000


def test_a_storage_that_cannot_be_emptied_stays_and_is_copied():
    borrowed = torch.from_numpy(np.ones(8))
    hut = shelter.HostOffload(torch.device("cpu"))
    hut.note(borrowed, torch.device("meta"))
    hut.offload()
    assert borrowed.sum() == 8
    assert hut.copy_of(borrowed, torch.device("cpu")).sum() == 8


def test_an_expanded_tensor_is_copied_whole():
    expanded = torch.arange(3.0).expand(2, 3)
    hut = shelter.HostOffload(torch.device("cpu"))
    assert hut.copy_of(expanded, torch.device("cpu")).tolist() == [[0, 1, 2]] * 2


def test_a_ctrl_c_waits_until_everything_is_back():
    done = []

    def restore():
        with shelter.uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("restored")

    with pytest.raises(KeyboardInterrupt):
        restore()
    assert done == ["restored"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
