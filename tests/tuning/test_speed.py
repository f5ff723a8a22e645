"""Windows of any size are estimated from the counted ones."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

import autobatch
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import find_gpu
from autobatch.gpus.links import links_of
from autobatch.gpus.roofline import EFFICIENCY
from autobatch.tuning.speed import SpeedModel
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from tests.support.simulated import window_estimate

A100 = find_gpu("a100-40gb")


def workload(**options) -> Workload:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 32 * 32, 64),
    )
    return Workload(
        model=model,
        batch=batch_builder(torch.zeros(2, 3, 32, 32)),
        loss=lambda model, batch: model(batch).mean(),
        autocast="bf16",
        **options,
    )


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("micro_batch", [3, 16, 200])
def test_a_speed_model_says_what_counting_that_size_says(micro_batch, steps):
    model = SpeedModel.of(workload(), A100)
    direct = window_estimate(workload(), A100, micro_batch=micro_batch, accumulation_steps=steps)
    found = model.estimate(micro_batch, steps)
    assert found.seconds == pytest.approx(direct.seconds)
    assert (found.bound, found.samples) == (direct.bound, direct.samples)
    assert model.seconds(micro_batch, steps) == found.seconds


class Offloaded(nn.Module):
    def __init__(self, is_on=True, width=256):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(4))
        )
        self.is_on = is_on

    def forward(self, x):
        with save_on_cpu(pin_memory=True) if self.is_on else contextlib.nullcontext():
            return self.layers(x)


def test_what_goes_through_the_host_grows_with_the_micro_batch():
    def training(is_on):
        sample = torch.zeros(2, 256)
        return Workload(model=Offloaded(is_on), batch=batch_builder(sample))

    card = find_gpu("t4")
    offloaded, plain = (SpeedModel.of(training(is_on), card) for is_on in (True, False))
    direct = window_estimate(training(True), card, micro_batch=4096, accumulation_steps=1)
    assert offloaded.seconds(4096, 1) == pytest.approx(direct.seconds)
    added = offloaded.seconds(65536, 1) - plain.seconds(65536, 1)
    saved = 4 * 2 * 65536 * 256 * 4  # the inputs of four layers and of their GELUs
    bandwidth = links_of(card).host_bytes_per_s * EFFICIENCY.link
    assert added == pytest.approx(2 * saved / bandwidth, rel=0.01)


@pytest.mark.slow
def test_offload_is_not_faster_where_both_fit():
    sample = torch.zeros(2, 256)
    given = {"target": 4096, "gpu": "t4", "sample": sample, "levers": ["offload"]}
    advice = autobatch.advise(Offloaded(is_on=False), **given)
    offloads = [one for one in advice.choices if one.fits]
    assert offloads
    assert all(one.window_seconds > advice.as_it_is.window_seconds for one in offloads)
    swept = autobatch.sweep(Offloaded(is_on=False), **given)
    assert "fastest: as it is" in str(swept)


def test_a_speed_model_runs_two_windows_for_any_number_of_sizes(monkeypatch):
    sizes = []
    run = VirtualGpu.run

    def counted(self, workload, *, micro_batch, **more):
        sizes.append(micro_batch)
        return run(self, workload, micro_batch=micro_batch, **more)

    monkeypatch.setattr(VirtualGpu, "run", counted)
    model = SpeedModel.of(workload(), A100)
    started = time.perf_counter()
    taken = [model.seconds(n, 2) for n in range(1, 101)]
    assert time.perf_counter() - started < 2
    assert sizes == [2, 3]
    assert taken == sorted(taken)


def test_a_batch_that_can_only_have_one_sample_is_counted_at_that():
    model = SpeedModel.of(workload(sample_limit=1), A100)
    assert model.seconds(1, 4) > 0


def test_windows_that_change_their_calls_are_counted_at_every_size():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            for _ in range(x.shape[0]):
                x = self.layer(x)
            return x.mean()

    branching = Workload(
        model=Branching(),
        batch=batch_builder(torch.zeros(2, 8)),
        loss=lambda model, batch: model(batch),
    )
    model = SpeedModel.of(branching, A100)
    direct = window_estimate(branching, A100, micro_batch=5, accumulation_steps=2)
    assert model.seconds(5, 2) == pytest.approx(direct.seconds)


def test_a_card_without_figures_has_no_estimate_and_runs_nothing(monkeypatch):
    monkeypatch.setattr(VirtualGpu, "run", None)
    card = find_gpu("24GiB")
    assert SpeedModel(workload(), card).estimate(4, 1) is None
    assert SpeedModel.of(workload(), card).seconds(4, 1) is None


def test_ranks_take_longer_for_the_same_samples():
    def seconds(world_size):
        made = Workload(
            model=nn.Linear(4096, 4096),
            batch=batch_builder(torch.zeros(2, 4096)),
            loss=lambda model, batch: model(batch).mean(),
            world_size=world_size,
        )
        return window_estimate(made, A100, micro_batch=8, accumulation_steps=1).seconds

    assert seconds(1) < seconds(2) < seconds(16)
