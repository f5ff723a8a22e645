"""Registering a device for simulated tensors disturbs no process that has a real accelerator."""

from __future__ import annotations

import contextlib
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F

from autobatch.devices.virtual import backend
from autobatch.errors import AutobatchError, WorkloadError
from autobatch.gpus.catalogue import find_gpu
from autobatch.support import process
from autobatch.support.torch_private import FakeTensor
from autobatch.tuning.tuner import predict
from tests.support.simulated import WIDTH, mlp, run


@pytest.fixture
def unregistered(monkeypatch):
    def refuse(**options):
        raise AssertionError("registered")

    monkeypatch.setattr(backend, "private_use_1_name", lambda: "privateuseone")
    monkeypatch.setattr(backend, "register_private_use_1", refuse)


def test_a_process_with_a_live_cuda_device_uses_that_device_type(unregistered, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert backend.virtual_device() == torch.device("cuda", 1)


def test_a_users_process_with_another_accelerator_is_left_alone(unregistered, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps")
    )
    with pytest.raises(AutobatchError, match=r"accelerator mps.*command line"):
        backend.virtual_device()


def test_the_command_lines_own_process_registers_there(unregistered, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps")
    )
    monkeypatch.setattr(process, "_ours", True)
    with pytest.raises(AssertionError, match="registered"):
        backend.virtual_device()


def test_another_backend_in_the_same_slot_is_left_alone(unregistered, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backend, "private_use_1_name", lambda: "npu")
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cpu")
    )
    with pytest.raises(AutobatchError, match="command line"):
        backend.virtual_device()


def test_nothing_of_the_simulation_stays_behind():
    set_autocast = torch.set_autocast_enabled
    is_available = torch.cuda.is_available
    run(mlp(), autocast="bf16")
    assert torch.set_autocast_enabled is set_autocast
    assert torch.cuda.is_available is is_available
    assert type(torch.empty(1)) is torch.Tensor
    assert torch.accelerator.is_available() == torch.cuda.is_available()


def _names() -> dict[str, object]:
    """What is replaced for the length of a run, with what it is now."""
    owners = (torch, torch.cuda, torch.cuda.memory, torch.accelerator, torch.nested, F, FakeTensor)
    return {f"{o.__name__}.{name}": value for o in owners for name, value in vars(o).items()}


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_pytorch_stays_replaced(fails):
    def loss(model, x):
        if fails:
            raise KeyError("of the user")
        return model(x).sum()

    run(mlp(), loss=lambda model, x: model(x).sum())  # what is imported or made once
    before = _names()
    with pytest.raises(WorkloadError) if fails else contextlib.nullcontext():
        run(mlp(), loss=loss)
    after = _names()
    assert {name for name in before if after.get(name) is not before[name]} == set()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the card here is found")
def test_a_function_that_builds_the_model_finds_the_card():
    found = []

    def build():
        found.append((torch.cuda.is_available(), torch.cuda.get_device_capability()))
        model = mlp().to("cuda")
        assert next(model.parameters()).device.type == "cpu"
        return model

    footprint = predict(build, micro_batch=2, sample=torch.zeros(2, WIDTH), gpu="t4")
    assert found == [(True, (7, 5))]
    assert footprint.parameters_bytes
    assert not torch.cuda.is_available()


def test_a_model_built_without_cuda_is_told_to_pass_a_function():
    config = None

    def loss(model, x):
        return model(x).sum() * (config["scale"] if x.is_cuda else 1)

    with pytest.raises(WorkloadError, match="pass a function that builds it"):
        run(mlp(), loss=loss)


def test_nested_tensors_and_scripts_are_refused_by_name():
    with pytest.raises(WorkloadError, match="nested tensors"):
        run(mlp(), loss=lambda model, x: torch.nested.nested_tensor([x[0], x[1]]).values().sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions deprecate it
        traced = torch.jit.trace(mlp(), torch.zeros(1, WIDTH))
    with pytest.raises(WorkloadError, match=r"torch\.jit"):
        run(traced)


@pytest.mark.parametrize("place", ["cuda", "virtual_gpu"])
def test_a_thread_that_runs_already_goes_on_with_the_card_in_the_machine(place):
    asked, told = threading.Event(), []
    really = torch.cuda.is_available(), torch.Generator().device

    def other():
        asked.wait()
        told.append((torch.cuda.is_available(), torch.Generator().device))

    thread = threading.Thread(target=other)
    thread.start()
    device = backend.virtual_device() if place == "virtual_gpu" else torch.device("cuda", 0)
    with backend._says_cuda(find_gpu("t4"), device):
        asked.set()
        thread.join()
        assert torch.cuda.get_device_name() == "t4" and torch.cuda.is_available()
        assert torch.Generator("cuda").device.type == "cuda"
        assert isinstance(torch.cuda.Stream(), torch.cuda.Stream)
        own = type("Own", (torch.cuda.Event,), {})
        assert type(own()) is own
    assert told == [really]
