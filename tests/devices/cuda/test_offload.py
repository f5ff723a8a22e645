"""What the user has on the card waits in host memory, and comes back as it was."""

import os
import signal

import numpy as np
import pytest
import torch

from autobatch import WorkloadError
from autobatch.devices.cuda import offload
from autobatch.devices.cuda.offload import HostOffload
from autobatch.support.interrupts import uninterrupted


def test_what_is_on_the_card_waits_in_host_memory_and_keeps_its_aliases():
    base = torch.arange(12.0)
    module = torch.nn.Linear(3, 4)
    module.weight = torch.nn.Parameter(base.view(4, 3))
    view = base[2:5]
    module.weight.grad = torch.ones(4, 3)
    waiting = HostOffload(torch.device("cpu"))
    shown = waiting.include(module.weight, torch.device("meta"))
    assert (shown.is_meta, shown.shape) == (True, (4, 3))
    waiting.offload()
    assert base.untyped_storage().nbytes() == 0
    assert module.weight.grad.untyped_storage().nbytes() == 0
    assert waiting.bytes_held == 12 * 4 * 2
    copied = waiting.copy_of(module.weight, torch.device("cpu"))
    assert copied.tolist() == torch.arange(12.0).view(4, 3).tolist()
    waiting.restore()
    assert base.tolist() == list(range(12)) and view.tolist() == [2, 3, 4]
    assert module.weight.grad.sum() == 12
    view.zero_()
    assert module.weight.detach()[0, 2] == 0  # still one memory


def test_a_host_without_room_is_told_before_anything_moves(monkeypatch):
    weight = torch.ones(1000)
    waiting = HostOffload(torch.device("cpu"))
    waiting.include(weight, torch.device("meta"))
    monkeypatch.setattr(offload, "free_host_bytes", lambda: 3999)
    with pytest.raises(WorkloadError, match=r"3\.91 KiB on the GPU"):
        waiting.offload()
    assert weight.sum() == 1000


def test_a_storage_that_cannot_be_emptied_stays_and_is_copied():
    borrowed = torch.from_numpy(np.ones(8))
    waiting = HostOffload(torch.device("cpu"))
    waiting.include(borrowed, torch.device("meta"))
    waiting.offload()
    assert borrowed.sum() == 8
    assert waiting.copy_of(borrowed, torch.device("cpu")).sum() == 8


def test_an_expanded_tensor_is_copied_whole():
    expanded = torch.arange(3.0).expand(2, 3)
    waiting = HostOffload(torch.device("cpu"))
    assert waiting.copy_of(expanded, torch.device("cpu")).tolist() == [[0, 1, 2]] * 2


def test_a_ctrl_c_waits_until_everything_is_back():
    done = []

    def restore():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("restored")

    with pytest.raises(KeyboardInterrupt):
        restore()
    assert done == ["restored"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
