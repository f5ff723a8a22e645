"""Registering a device for simulated tensors disturbs no process that has a real accelerator."""

from __future__ import annotations

import pytest
import torch

from autobatch.devices.virtual import backend
from autobatch.errors import AutobatchError
from autobatch.support import process
from tests.support.simulated import mlp, run


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
