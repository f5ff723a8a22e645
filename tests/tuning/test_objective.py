"""Which micro-batch is planned, where time is asked for."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch import GpuSpec, Plan, SampleError, UsageError
from autobatch.gpus.catalogue import find_gpu
from autobatch.support.units import GIB, MIB
from autobatch.tuning.objective import samples_per_second
from autobatch.workload.workload import Workload
from tests.support.cuda_on_cpu import CudaOnCpu, installed
from tests.support.simulated import window_estimate


def workload(width: int = 64) -> Workload:
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    return Workload(model=model, batch=lambda n: torch.zeros(n, width))


def planned(objective: str, **options: object) -> Plan:
    given = {"target": 512, "gpu": "t4", "objective": objective}
    return autobatch.tune(workload(), **given | options)


def test_times_of_a_simulated_card_are_estimates_of_the_whole_window() -> None:
    plan = planned("fastest")
    assert {point.how for point in plan.speed} == {"estimate"}
    for point in plan.speed:
        assert point.micro_batch * point.accumulation_steps == plan.target
        estimate = window_estimate(
            workload(),
            find_gpu("t4"),
            micro_batch=point.micro_batch,
            accumulation_steps=point.accumulation_steps,
        )
        assert estimate is not None
        assert point.window_seconds == pytest.approx(estimate.seconds, rel=1e-6)
        assert point.low < point.window_seconds < point.high


def test_the_fastest_takes_least_and_the_balanced_is_the_smallest_near_it() -> None:
    fastest, balanced = planned("fastest"), planned("balanced")
    seconds = {point.micro_batch: point.window_seconds for point in fastest.speed}
    assert seconds[fastest.micro_batch] == min(seconds.values())
    near = [size for size, taken in seconds.items() if taken <= 1.03 * min(seconds.values())]
    assert balanced.micro_batch == min(near)
    assert (fastest.objective, balanced.objective) == ("fastest", "balanced")
    for plan in (fastest, balanced):
        assert plan.footprint.micro_batch == plan.micro_batch
        assert plan.footprint.peak_reserved_bytes <= plan.budget_bytes
        assert Plan.from_json(plan.to_json()) == plan


def test_the_largest_is_planned_without_an_estimate() -> None:
    plan = planned("largest")
    assert plan.speed == () and plan.micro_batch == 512


@pytest.mark.slow
def test_windows_are_timed_on_a_card_that_is_here() -> None:
    with installed(CudaOnCpu(32 * MIB)):  # a larger one computes long
        plan = autobatch.tune(workload(256), target=256, objective="fastest")
    assert {point.how for point in plan.speed} == {"measured"}
    ran = {(trial.micro_batch, trial.accumulation_steps) for trial in plan.trials}
    for point in plan.speed:
        assert (point.micro_batch, min(point.accumulation_steps, 8)) in ran
        assert 0 < point.low <= point.window_seconds <= point.high
    best = min(plan.speed, key=lambda point: point.window_seconds)
    assert plan.micro_batch == best.micro_batch
    assert "Speed (measured)" in str(plan)


def test_no_micro_batch_is_called_faster_than_the_loader() -> None:
    class Slow(TensorDataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            time.sleep(2e-3)
            return super().__getitem__(index)

    loader = DataLoader(Slow(torch.zeros(64, 64)), batch_size=8)
    plan = planned("balanced", loader=loader)
    assert plan.loader_samples_per_s is not None and 50 < plan.loader_samples_per_s < 500
    # the smallest that was looked at, as all wait for the loader
    assert plan.micro_batch == min(point.micro_batch for point in plan.speed)
    assert any("a larger micro-batch gains nothing" in note for note in plan.warnings)


def test_timing_a_loader_leaves_the_random_state_alone() -> None:
    loader = DataLoader(TensorDataset(torch.zeros(64, 64)), batch_size=8, shuffle=True)
    training, before = workload(), torch.get_rng_state()
    assert samples_per_second(loader, training) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_timing_a_loader_leaves_the_loader_and_its_data_as_they_were() -> None:
    class Counted(TensorDataset):
        reads = 0

        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            self.reads += 1
            return super().__getitem__(index)

    data, own = Counted(torch.zeros(64, 64)), torch.Generator().manual_seed(3)
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=own)
    before, attributes = own.get_state(), dict(vars(loader))
    assert samples_per_second(loader, workload()) > 0
    assert torch.equal(own.get_state(), before)
    assert loader.generator is own and loader.sampler.generator is own
    assert dict(vars(loader)) == attributes and data.reads == 0


def test_the_report_says_why_a_smaller_micro_batch_is_planned(tmp_path: Path) -> None:
    plan = autobatch.tune(workload(4096), target=8192, gpu="t4", objective="balanced")
    assert plan.micro_batch < plan.ceiling_at_least
    plan.report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "at most 3 % longer than the fastest" in " ".join(text.split())
    assert "fewest equal steps" not in text


def test_a_plan_with_a_loader_is_not_answered_from_a_file(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.zeros(64, 64)), batch_size=8)
    file = tmp_path / "plan.json"
    planned("largest", loader=loader, cache=file)
    assert not file.exists()


def test_a_loader_that_timing_would_use_up_is_refused() -> None:
    with pytest.raises(UsageError, match="only once"):
        planned("fastest", loader=iter([torch.zeros(2, 64)] * 4))
    with pytest.raises(SampleError, match="at least two"):
        planned("fastest", loader=[torch.zeros(2, 64)])


def test_a_card_of_unknown_speed_has_no_fastest() -> None:
    card = GpuSpec(name="mine", capacity_bytes=8 * GIB)
    assert planned("largest", gpu=card).micro_batch == 512
    with pytest.raises(UsageError, match="the speed of mine is not known"):
        planned("fastest", gpu=card)


def test_an_objective_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="'largest', 'fastest', 'balanced'"):
        planned("quickest")
