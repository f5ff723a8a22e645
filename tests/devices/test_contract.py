"""What every device owes to those who run workloads on it, whatever kind it is."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autobatch.devices.base import WINDOWS, Device, Run
from autobatch.errors import WorkloadError
from autobatch.memory.replay import simulate
from autobatch.memory.trace_model import TraceModel
from autobatch.support.units import MIB
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from tests.support.devices import KINDS, opened

WIDTH = 256
WEIGHTS = 3 * (WIDTH * WIDTH + WIDTH)

pytestmark = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    """Three layers, with a buffer; it may raise."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
        self.register_buffer("scale", torch.ones(1000))
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return self.layers(x).relu() * self.scale.sum()


def job(**options: Any) -> Workload:
    given = {
        "model": Net(),
        "batch": batch_builder(torch.ones(2, WIDTH)),
        "loss": lambda model, x: model(x).square().mean(),
        "optimizer": torch.optim.Adam,
    }
    return Workload(**given | options)


def run(device: Device, workload: Workload, n: int = 8, steps: int = 2) -> Run:
    with device.hosting(workload):
        return device.run(workload, micro_batch=n, accumulation_steps=steps)


@cache
def ran(kind: str) -> Run:
    """Return what a plain run told; it is frozen, so that tests share it."""
    return run(opened(kind), job())


@pytest.mark.slow
def test_a_run_tells_two_whole_windows_in_their_order(kind: str) -> None:
    trace = ran(kind).trace
    marks = [(mark.phase, mark.window, mark.micro_batch) for mark in trace.marks]
    window = [(phase, step) for step in range(2) for phase in ("inputs", "forward", "backward")]
    window.append(("step", 1))
    two = [(phase, number, step) for number in range(WINDOWS) for phase, step in window]
    assert marks == [("setup", 0, 0), *two]
    assert [mark.event for mark in trace.marks] == sorted(mark.event for mark in trace.marks)
    assert (trace.micro_batch, trace.accumulation_steps) == (8, 2)


def test_every_block_is_allocated_once_and_freed_at_most_once(kind: str) -> None:
    trace = ran(kind).trace
    allocated = [event for event in trace.events if event >= 0]
    freed = [~event for event in trace.events if event < 0]
    assert sorted(allocated) == list(range(len(trace.blocks)))
    assert len(set(freed)) == len(freed)
    assert all(trace.events.index(b) < trace.events.index(~b) for b in freed)


@pytest.mark.slow
def test_each_owners_bytes_are_those_of_its_tensors(kind: str) -> None:
    result = ran(kind)
    at_the_end = result.trace.by_category(len(result.trace.events) - 1)
    totals: dict[str, int] = {}
    for block in result.trace.blocks:
        totals[block.category] = totals.get(block.category, 0) + block.size_bytes
    assert totals["parameters"] == 4 * WEIGHTS
    assert totals["buffers"] == 4 * 1000
    assert totals["optimizer_state"] >= 2 * 4 * WEIGHTS
    assert at_the_end["parameters"] == 4 * WEIGHTS


@pytest.mark.slow
def test_the_replay_is_what_the_allocator_does_with_the_trace(kind: str) -> None:
    device = opened(kind)
    with device.hosting(job()):
        start = device.allocator()
        result = device.run(job(), micro_batch=8, accumulation_steps=2)
    again = simulate(
        result.trace.sizes, result.trace.events, allocator=start, streams=result.trace.streams
    )
    assert again.peak_allocated_bytes == result.replay.peak_allocated_bytes
    if kind != "gpu":  # there it differs by up to 1%
        assert again.peak_reserved_bytes == result.replay.peak_reserved_bytes
    assert result.replay.peak_reserved_bytes >= result.replay.peak_allocated_bytes
    assert result.is_free and result.shortage is None


@pytest.mark.slow
def test_a_run_repeats_itself(kind: str) -> None:
    device = opened(kind)
    with device.hosting(job()):
        first, second = (
            device.run(job(), micro_batch=4, accumulation_steps=2).trace for _ in range(2)
        )
    assert first == second


@pytest.mark.slow
def test_two_sizes_foretell_a_third(kind: str) -> None:
    device = opened(kind)
    with device.hosting(job()):
        traces = {
            n: device.run(job(), micro_batch=n, accumulation_steps=2).trace for n in (2, 3, 40)
        }
    model = TraceModel.fit([traces[2], traces[3]], kernels_may_vary=device.scratch_varies)
    assert model.difference(traces[40]) is None


def test_a_budget_is_kept_or_not_by_what_was_reserved(kind: str) -> None:
    result = ran(kind)
    needed = result.replay.peak_reserved_bytes
    assert result.fits(needed) and not result.fits(needed - 1)
    assert not replace(result, shortage="no room").fits(needed)


@pytest.mark.slow
def test_more_memory_is_needed_by_more_samples_and_by_accumulation(kind: str) -> None:
    device = opened(kind)
    peaks = [run(device, job(), n=n).replay.peak_allocated_bytes for n in (64, 512, 4096)]
    assert peaks == sorted(set(peaks))
    alone = run(device, job(), n=512, steps=1).replay.peak_allocated_bytes
    assert alone <= peaks[1]


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyError("broken")])
def test_an_error_of_the_users_code_is_one_line_with_its_cause(kind: str, error: Any) -> None:
    with pytest.raises(WorkloadError, match=r"Net failed at micro-batch 8: \w+Error") as caught:
        run(opened(kind), job(model=Net(error)))
    assert isinstance(caught.value.__cause__, type(error))
    result = run(opened(kind), job())  # and the next run is none the worse
    assert result.is_free


@pytest.mark.slow
def test_what_was_run_is_said(kind: str) -> None:
    result = run(opened(kind), job(loss=None))
    assert (result.loss, result.optimizer) == ("surrogate sum", "Adam")
    assert result.seconds > 0
    assert run(opened(kind), job(loss_name="mse")).loss == "mse"


def test_the_answers_of_a_device_agree_with_each_other(kind: str) -> None:
    device = opened(kind, capacity_bytes=128 * MIB)
    simulated = kind == "simulated"
    assert device.is_simulated is simulated
    assert device.evidence == ("simulated" if simulated else "measured")
    assert device.must_run_the_plan is device.scratch_varies is not simulated
    assert 0 < device.default_headroom < 0.5
    assert 0 < device.usable_bytes <= device.spec.capacity_bytes
    assert device.others_bytes >= 0
    assert all(isinstance(note, str) for note in device.notes())
    like = device.simulated()
    assert like.is_simulated and like.usable_bytes == device.usable_bytes
    assert (like is device and device.host_limit_bytes() is None) is simulated


@pytest.mark.slow
def test_a_run_counts_the_copy_that_changes_were_made_to(kind: str) -> None:
    assert ran(kind).counts is None
    changed = job(changes=(lambda model: model.layers[0].requires_grad_(False) and None,))
    counts = run(opened(kind), changed).counts
    assert counts is not None
    assert counts.parameters == WEIGHTS
    assert counts.trainable_parameters == WEIGHTS * 2 // 3
    assert counts.frozen == ("layers.0",)
