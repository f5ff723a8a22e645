"""Nothing of the user's changes, whatever happens: on every kind of device."""

import contextlib
import gc
import weakref

import numpy
import pytest
import torch

import autobatch
from autobatch import DoesNotFitError, GpuSpec, UsageError, WorkloadError
from autobatch.devices.cuda.runtime import CudaRuntime
from autobatch.devices.preserve import process_state_preserved, switches_kept
from autobatch.support.units import MIB
from tests.bench.inside import is_on_the_bench
from tests.support.busy import lm_loss, state_of, trained
from tests.support.cuda_on_cpu import CudaOnCpu, installed
from tests.support.devices import KINDS


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
    "exits inside the model": ({}, SystemExit(3), WorkloadError),
}
SIMULATED = GpuSpec(name="card", capacity_bytes=100 * MIB)


@contextlib.contextmanager
def device(kind):
    """Give the arguments of `tune` for a kind of device, and what its allocator counts."""
    if kind == "simulated":
        yield {"gpu": SIMULATED, "autocast": "fp16"}, lambda: None
    elif kind == "played":
        with installed(CudaOnCpu(32 * MIB, context_bytes=2 * MIB)) as card:
            card.raise_peaks(allocated_bytes=5 * MIB, reserved_bytes=20 * MIB)
            yield {}, card.stats
    else:
        card = CudaRuntime()
        card.raise_peaks(allocated_bytes=50 * MIB + 512, reserved_bytes=84 * MIB)
        card.empty_cache()
        yield {"autocast": "fp16", "target": 64}, card.stats


@pytest.mark.slow
@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_users_changes_after(kind, outcome):
    options, fail_with, expected = OUTCOMES[outcome]
    gc.collect()  # garbage of other tests does not count
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
            assert now.peak_reserved_bytes == counted.peak_reserved_bytes
    model.fail_with = None
    place = next(model.parameters()).device
    lm_loss(model, sample.to(place)).backward()  # and training simply goes on
    optimizer.step()
    if not (kind == "gpu" and is_on_the_bench()):  # where kernels compute
        assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("own", [0, 375])
def test_what_was_there_before_can_be_collected_afterwards(own, monkeypatch):
    """Python 3.12 starts with objects of its own that are frozen, which is not the user's doing."""

    class Circular:
        pass

    monkeypatch.setattr(gc, "get_freeze_count", lambda: own)
    circle = Circular()
    circle.itself, is_alive = circle, weakref.ref(circle)
    with process_state_preserved():
        pass
    del circle
    gc.collect()
    assert is_alive() is None


def switches():
    cuda = torch.backends.cuda
    return {
        "products": (torch.get_float32_matmul_precision(), cuda.matmul.fp32_precision),
        "of halves": cuda.matmul.allow_bf16_reduced_precision_reduction,
        "attention": (cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()),
        "convolutions": torch.backends.cudnn.benchmark,
        "anomalies": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "of NumPy": numpy.geterr()["over"],
    }


def set_all():
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cudnn.benchmark = True
    torch.autograd.set_detect_anomaly(True)
    torch.set_num_threads(1)
    numpy.seterr(over="raise")


def test_switches_that_building_the_model_or_the_loss_sets_are_put_back():
    def build():
        set_all()
        torch.set_default_dtype(torch.float64)
        return torch.nn.Linear(4, 4)

    def loss(model, batch):
        set_all()
        return (
            model(batch) @ torch.ones(4, device=batch.device)
        ).mean()  # of the dtype that building the model set

    before = switches()
    sample = torch.zeros(2, 4, dtype=torch.float64)
    autobatch.tune(build, target=8, sample=sample, loss=loss, gpu=SIMULATED, cache=False)
    assert switches() == before


def test_a_precision_of_products_that_was_set_by_its_parts_is_left_alone():
    products = torch.backends.cuda.matmul
    with switches_kept():
        products.fp32_precision = "tf32"
        with switches_kept():
            products.fp32_precision = "ieee"
        assert products.fp32_precision == "tf32"
