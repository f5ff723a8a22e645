"""What goes through the host is counted, and what a loader copies ahead is not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.work import Work
from tests.devices.virtual.test_work import N, work
from tests.levers.setups import options_of, setup_of, transformer

WIDTH = 64
ROWS = 4 * N * WIDTH  # bytes of a batch of rows
WEIGHT = 4 * WIDTH * WIDTH


def layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)))


class Around(nn.Module):
    """Does something with what layers give, where they run."""

    def __init__(self, around, **tensors):
        super().__init__()
        self.layers, self.around = layers(), around
        self.__dict__.update(tensors)

    def forward(self, x):
        return self.around(self, x)


def traffic(part: Work) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for one in part.communication:
        sizes[one.collective] += one.bytes
    return sizes


def rows() -> torch.Tensor:
    return torch.zeros(2, WIDTH)


def test_a_batch_and_what_the_host_makes_cost_nothing():
    def around(self, x):
        return self.layers(x) * torch.arange(WIDTH).to(x.device)

    for model in (layers(), Around(around)):
        found = work(model, rows(), steps=2)
        parts = (found.forward, found.backward, found.later_forward, found.update)
        assert not any(part.communication for part in parts)


@pytest.mark.parametrize("pinned", [False, True])
def test_what_is_saved_on_the_host_goes_there_and_comes_back(pinned):
    def around(self, x):
        with save_on_cpu(pin_memory=pinned):
            return self.layers(x)

    found = work(Around(around), rows(), steps=2)
    saved = 2 * ROWS + WEIGHT  # both layers' inputs, and the weight that the second one needs again
    assert traffic(found.forward) == traffic(found.later_forward) == {"to_host": saved}
    assert traffic(found.backward) == traffic(found.later_backward) == {"from_host": saved}
    assert not any(one.overlaps for one in found.forward.communication)
    plain = work(layers(), rows(), steps=2)
    assert (found.forward.ops, found.backward.ops) == (plain.forward.ops, plain.backward.ops)


def test_a_copy_of_the_user_s_is_counted_there_and_back():
    def around(self, x):
        return (self.layers(x).cpu() * 2).to(x.device)

    found = work(Around(around), rows())
    both = {"to_host": ROWS, "in_host": 2 * ROWS, "from_host": ROWS}
    assert traffic(found.forward) == traffic(found.backward) == both


def test_a_copy_has_the_bytes_of_the_type_that_arrives():
    def around(self, x):
        return self.layers(x).to("cpu", torch.bfloat16).to(x.device, torch.float32)

    found = work(Around(around), rows())
    assert traffic(found.forward) == {"to_host": ROWS / 2, "from_host": ROWS}


def test_what_the_setup_put_on_the_host_is_copied_each_time():
    def around(self, x):
        return self.layers(x) * self.scale.to(x.device)

    found = work(Around(around, scale=torch.ones(WIDTH)), rows(), steps=2)
    assert traffic(found.forward) == traffic(found.later_forward) == {"from_host": 4 * WIDTH}


class HostSGD(torch.optim.Optimizer):
    """Updates on the host, as torchao's `CPUOffloadOptimizer`."""

    def __init__(self, parameters):
        super().__init__(list(parameters), {})
        self.on_host = {
            parameter: torch.empty_like(parameter, device="cpu", pin_memory=True).copy_(parameter)
            for parameter in self.param_groups[0]["params"]
        }

    @torch.no_grad()
    def step(self, closure=None):
        for parameter, master in self.on_host.items():
            master.add_(parameter.grad.cpu(), alpha=-0.1)
            parameter.copy_(master, non_blocking=True)


def test_an_update_on_the_host_takes_gradients_there_and_brings_parameters_back():
    found = work(layers(), rows(), optimizer=HostSGD)
    sizes = traffic(found.update)
    assert sizes["to_host"] == sizes["from_host"] == 2 * WEIGHT
    assert sizes["in_host"] == 2 * 3 * WEIGHT  # two are read and one is written
    assert not traffic(found.forward)


def test_shares_on_the_host_are_copied_beside_the_kernels():
    setup = setup_of(replace(transformer(), world_size=2))
    options = options_of(setup)

    def counted(label):
        device = VirtualGpu(setup.gpu, counts_work=True)
        shared = options[label].apply(setup).workload
        return device.run(shared, micro_batch=2, accumulation_steps=2).work

    on_card, offloaded = (counted(f"sharding: {on}") for on in ("FSDP2", "FSDP2, offloaded"))
    assert set(traffic(on_card.forward)) == {"all_gather"}
    sizes = traffic(offloaded.forward)
    assert sizes["from_host"] == pytest.approx(sizes["all_gather"] / 2)
    copies = [
        one
        for one in (*offloaded.forward.communication, *offloaded.backward.communication)
        if one.collective in ("to_host", "from_host")
    ]
    assert all(one.overlaps for one in copies)
    assert traffic(offloaded.backward)["to_host"] == pytest.approx(sizes["from_host"])
    assert set(traffic(offloaded.update)) == {"in_host"}
