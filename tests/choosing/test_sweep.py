"""`sweep`: what it runs, what it prunes, and how it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("optuna")

import optuna
from optuna.trial import TrialState

import autobatch
from autobatch.choosing import points, sweeping
from autobatch.choosing import sweep as module
from autobatch.choosing.bench import GpuBench, SimulatedBench
from autobatch.choosing.known import Known
from autobatch.choosing.sweep import sweep
from autobatch.errors import DoesNotFitError, UsageError, WorkloadError
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.plan.plan import Plan
from autobatch.records.progress import Progress
from autobatch.report.sweep import sweep_summary
from autobatch.support.units import MIB
from autobatch.workload.workload import Workload
from tests.support import ROOT
from tests.support.sweeps import GIB, FakeBench, fake_sweep

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(torch.relu(self.wide(x)))


def network(width: int = 256, depth: int = 4) -> Workload:
    model = nn.Sequential(*(Block(width) for _ in range(depth)))
    return Workload(model=model, batch=lambda n: torch.zeros(n, 64, width))


def storages(tmp_path: Path) -> list[str]:
    return [f"sqlite:///{tmp_path / 'sweep.db'}", str(tmp_path / "sweep.journal")]


def states(storage: str) -> Counter[TrialState]:
    opened: Any = storage
    if "://" not in storage:
        backend = optuna.storages.journal.JournalFileBackend(storage)
        opened = optuna.storages.JournalStorage(backend)
    study = optuna.load_study(study_name="autobatch", storage=opened)
    return Counter(trial.state for trial in study.get_trials())


def test_a_small_space_is_gone_through_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = FakeBench()
    found = fake_sweep(bench, monkeypatch)
    assert found.sampler == "whole space" and found.left == 0
    assert found.configurations == len(found.trials)
    keys = {(trial.label, trial.micro_batch) for trial in found.trials}
    assert len(keys) == len(found.trials)
    labels = {label for label, _ in keys}
    assert "as it is" in labels and "checkpointing: every block" in labels
    assert {size for _, size in keys} == {64, 32, 16, 8, 4, 2, 1}


def test_pruned_trials_cost_no_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = FakeBench()
    found = fake_sweep(bench, monkeypatch)
    pruned = [trial for trial in found.trials if trial.outcome == "pruned"]
    assert len(pruned) >= 5
    assert sum(trial.executions for trial in pruned) == 0
    assert all(trial.reason for trial in pruned)
    others = [trial for trial in found.trials if trial.outcome != "pruned"]
    assert [trial.executions for trial in others] == [1] * len(bench.ran)
    assert found.executions == len(bench.ran) == len(set(bench.ran))
    assert found.count("does not fit") > 0


def test_pruning_finds_what_running_everything_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = fake_sweep(FakeBench(), monkeypatch)
    monkeypatch.setattr(Known, "why_not", lambda *_: None)
    everything = fake_sweep(FakeBench(), monkeypatch)
    assert everything.executions == everything.configurations > pruned.executions
    figures = [
        [(trial.seconds, trial.reserved_bytes) for trial in found.front]
        for found in (pruned, everything)
    ]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_pruning_finds_on_a_simulated_card_what_running_everything_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"target": 16, "gpu": "t4", "levers": ["checkpointing"]}
    pruned = sweep(network(), **options)
    monkeypatch.setattr(Known, "why_not", lambda *_: None)
    everything = sweep(network(), **options)
    assert pruned.executions < everything.executions
    figures = [
        [(trial.seconds, trial.reserved_bytes) for trial in found.front]
        for found in (pruned, everything)
    ]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_memory_and_time_are_those_of_the_plan_and_the_estimate() -> None:
    workload = network()
    found = sweep(workload, target=64, gpu="t4", levers=["allocator"], trials=3)
    best = found.as_it_is
    assert best is not None and (found.memory, found.time) == ("simulated", "estimate")
    plan = autobatch.tune(workload, target=64, gpu="t4")
    assert best.micro_batch == plan.micro_batch == 64
    assert best.reserved_bytes == plan.footprint.peak_reserved_bytes
    assert found.plan.micro_batch == found.best.micro_batch
    from autobatch.gpus.catalogue import find_gpu
    from tests.support.simulated import window_estimate

    estimate = window_estimate(workload, find_gpu("t4"), micro_batch=64, accumulation_steps=1)
    assert estimate is not None and best.seconds == pytest.approx(estimate.seconds)


def test_the_plan_has_the_micro_batch_of_the_best_where_that_is_not_the_largest() -> None:
    from autobatch.choosing.samplers import FixedTrial
    from autobatch.choosing.space import MICRO_BATCH, Configuration, Space
    from autobatch.devices.virtual.gpu import VirtualGpu
    from autobatch.gpus.catalogue import find_gpu
    from autobatch.levers.setup import Setup

    card = find_gpu("t4")
    setup = Setup(workload=network(16, 1), gpu=card)
    space = Space(setup, 16, ["precision"], allow_numerics=False, keeps_settings=False)
    chosen = space.configuration(FixedTrial({"precision": "as it is", MICRO_BATCH: 4}))
    assert isinstance(chosen, Configuration)
    plan = SimulatedBench(VirtualGpu(card), 16, None).plan(chosen)
    assert (plan.micro_batch, plan.accumulation_steps, plan.target) == (4, 4, 16)


def test_a_setting_of_the_process_holds_for_its_configurations_alone() -> None:
    before = torch.get_float32_matmul_precision()
    model = nn.Linear(4096, 4096)
    found = sweep(model, target=4096, gpu="a100-40gb", levers=["precision"], trials=6)
    assert torch.get_float32_matmul_precision() == before == "highest"
    times = {trial.label: trial.seconds for trial in found.trials if trial.micro_batch == 4096}
    plain, fast = times["as it is"], times["precision: tf32"]
    assert plain is not None and fast is not None and fast < 0.5 * plain


def test_the_users_model_stays_as_it_is() -> None:
    workload = network(16, 2)
    before = {name: value.clone() for name, value in workload.model.state_dict().items()}
    kinds = [type(each) for each in workload.model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    sweep(workload, target=2, gpu="t4", levers=["checkpointing"])
    assert torch.equal(torch.rand(1), expected)
    assert [type(each) for each in workload.model.modules()] == kinds
    after = workload.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_space_that_is_not_small_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WHOLE", 10)
    bench = FakeBench()
    found = fake_sweep(bench, monkeypatch, trials=20, seed=1)
    assert (found.sampler, found.configurations, found.left) == ("TPESampler", 35, 15)
    assert "20 of 35 configurations, and 15 not looked at" in " ".join(str(found).split())
    assert len(bench.ran) == len(set(bench.ran)) == 20
    assert sum(trial.executions for trial in found.trials) == 20
    assert found.as_it_is is not None  # what the others are compared with comes first
    assert bench.ran[0] == ("checkpointing: as it is", 64)


def test_what_was_left_out_is_a_note_and_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake_sweep(FakeBench(), monkeypatch, trials=3)
    titles = {section.title: section for section in sweep_summary(found).sections}
    assert "not all configurations were looked at" in str(titles["Notes"])
    assert "Warnings" not in titles


class Stubborn(optuna.samplers.RandomSampler):
    """Proposes the same configuration again and again."""

    def sample_independent(self, study: Any, trial: Any, name: str, among: Any) -> Any:
        return among.choices[-1] if hasattr(among, "choices") else among.low


@pytest.mark.parametrize("counted", [0, 2_000])
@pytest.mark.parametrize("sampler", ["random", Stubborn()], ids=["random", "stubborn"])
def test_what_a_sampler_does_not_propose_is_looked_at_too(
    sampler: Any, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(points, "_COUNTED", counted)
    monkeypatch.setattr(sweeping, "_AT_ONCE", 2)
    bench = FakeBench()
    found = fake_sweep(bench, monkeypatch, sampler=sampler, trials=10_000, seed=1)
    assert found.sampler in ("RandomSampler", "Stubborn")
    whole = fake_sweep(FakeBench(), monkeypatch)
    assert [t.label for t in found.front] == [t.label for t in whole.front]
    assert len(found.trials) == len(whole.trials) == 35 and found.left == 0
    assert found.configurations == (35 if counted else None)
    assert len(bench.ran) == len(set(bench.ran))


def test_trials_go_to_combinations_that_a_sampler_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = FakeBench()
    found = fake_sweep(bench, monkeypatch, sampler=Stubborn(), trials=25)
    assert len(bench.ran) == 25
    assert len({label for label, _ in bench.ran}) == 5  # all that there are
    assert (found.configurations, found.left) == (35, 35 - len(found.trials))


def clipping(trial: Any) -> Any:
    is_on = trial.suggest_categorical("clip", ["on", "off"]) == "on"
    return lambda setup: setup.having(clip_norm=1.0) if is_on else setup


class ClippingBench(FakeBench):
    """One to which clipping costs a second."""

    def run(self, configuration: Any) -> Any:
        settings = dict(configuration.settings)
        slower = settings.pop("clip") == "on"
        tried = super().run(replace(configuration, settings=settings))
        self.ran[-1] = (f"{self.ran[-1][0]}, clip: {slower}", configuration.micro_batch)
        return replace(tried, seconds=tried.seconds and tried.seconds + slower)


@pytest.mark.parametrize("counted", [0, 2_000])
def test_of_a_large_space_with_a_lever_of_ones_own_what_is_untried_follows(
    counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WHOLE", 10)
    monkeypatch.setattr(points, "_COUNTED", counted)
    bench = ClippingBench()
    levers = ["checkpointing", clipping]
    found = fake_sweep(bench, monkeypatch, sampler=Stubborn(), levers=levers, trials=10_000)
    assert bench.ran[0] == ("checkpointing: as it is, clip: False", 64)
    assert len(found.trials) == 70 and found.left == 0
    assert found.configurations == (70 if counted else None)
    assert found.best.settings == {"checkpointing": "as it is", "clip": "off"}
    assert not any("nothing new" in note for note in found.notes)


def test_values_of_own_levers_that_cannot_be_listed_end_the_sweep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def share(trial: Any) -> Any:
        trial.suggest_float("share", 0.1, 0.9)
        return lambda setup: setup

    found = fake_sweep(FakeBench(), monkeypatch, sampler=Stubborn(), levers=[share], trials=10_000)
    assert any("nothing new 30 times in a row" in note for note in found.notes)
    assert {trial.micro_batch for trial in found.trials} == {64, 32, 16, 8, 4, 2, 1}
    assert found.configurations is None


def halves(trial: Any) -> Any:
    value = trial.suggest_categorical("half", ["ok", "bad"])

    def change(setup: Any) -> Any:
        if value == "bad":
            raise RuntimeError("no such layer")
        return setup

    return change


@pytest.mark.parametrize("sampler", [None, "random"])
def test_what_a_lever_of_ones_own_raises_fails_its_configurations_alone(
    sampler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = FakeBench()
    found = fake_sweep(bench, monkeypatch, levers=[halves], sampler=sampler, seed=0)
    assert {label for label, _ in bench.ran} == {"half: ok"}
    assert found.best.settings == {"half": "ok"}
    failed = [trial for trial in found.trials if trial.outcome == "failed"]
    assert failed and all(trial.settings == {"half": "bad"} for trial in failed)
    assert "the lever halves raised RuntimeError: no such layer" in (failed[0].reason or "")
    assert not any(trial.executions for trial in failed)


def raising(trial: Any) -> Any:
    raise ValueError("boom")


def test_an_error_of_a_lever_of_ones_own_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkloadError, match="the lever raising raised ValueError: boom"):
        fake_sweep(FakeBench(), monkeypatch, levers=[raising])
    assert capfd.readouterr().err == ""


def test_a_lever_that_is_wrong_leaves_no_trial_that_others_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(trial: Any) -> Any:
        value = trial.suggest_float("late", 0.1, 0.9)
        return lambda setup: setup if value == 0.1 else None

    storage = str(tmp_path / "sweep.journal")
    with pytest.raises(UsageError, match="made a NoneType of a Setup"):
        fake_sweep(FakeBench(), monkeypatch, levers=[late], sampler="random", storage=storage)
    had = states(storage)
    assert (had[TrialState.FAIL], had[TrialState.RUNNING]) == (1, 0)


def test_a_change_of_the_users_model_in_a_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = network(64, 2)

    def freeze(trial: Any) -> Any:
        return lambda setup: setup.changed(lambda copy: setup.model[0].requires_grad_(False))

    with pytest.raises(UsageError, match=r"a run with as it is changed .*requires_grad"):
        sweep(workload, target=4, gpu="t4", levers=[freeze])
    assert all(parameter.requires_grad for parameter in workload.model.parameters())


@pytest.mark.parametrize("sampler", [None, "random"])
def test_what_a_lever_cannot_be_had_with_is_no_failure(sampler: str | None) -> None:
    found = sweep(network(64, 2), target=4, gpu="t4", levers=["optimizer"], sampler=sampler, seed=0)
    assert found.count("failed") == 0
    sizes = {t.micro_batch for t in found.trials if t.settings["optimizer"] == "in backward"}
    assert sizes == {4}
    assert found.left == 0 and found.configurations == len(found.trials)


class Counting(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


def test_a_lever_that_a_model_refuses_is_no_failure_and_given_up() -> None:
    model = nn.Sequential(*(Counting(64) for _ in range(2)))
    workload = Workload(model=model, batch=lambda n: torch.zeros(n, 64, 64))
    found = sweep(workload, target=8, gpu="t4", levers=["checkpointing"])
    refused = [t for t in found.trials if t.outcome == "cannot be had"]
    assert {t.executions for t in refused} == {1}
    assert all("runs twice" in (t.reason or "") for t in refused)
    assert len({t.label for t in refused}) == len(refused)  # each with one micro-batch
    assert found.count("failed") == 0 and found.best.is_as_it_is
    assert "cannot be had" in str(found)


def test_a_sampler_of_optuna_can_be_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = optuna.samplers.NSGAIISampler(population_size=4, seed=0)
    found = fake_sweep(FakeBench(), monkeypatch, sampler=sampler, trials=6)
    assert found.sampler == "NSGAIISampler" and found.executions == 6


@pytest.mark.slow
def test_time_that_is_up_begins_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = FakeBench(lambda _: time.sleep(0.5))
    found = fake_sweep(bench, monkeypatch, timeout=1.6)
    assert 2 <= len(bench.ran) <= 5
    assert found.left > 0
    assert "not looked at" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1])
def test_a_sweep_goes_on_where_it_was(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = storages(tmp_path)[kind]
    first, second, third = FakeBench(), FakeBench(), FakeBench()
    begun = fake_sweep(first, monkeypatch, storage=storage, trials=3)
    assert len(first.ran) == 3 and begun.left
    whole = fake_sweep(second, monkeypatch, storage=storage)
    assert not set(first.ran) & set(second.ran) and not whole.left
    again = fake_sweep(third, monkeypatch, storage=storage)
    assert third.ran == []
    assert again.trials == whole.trials
    alone = fake_sweep(FakeBench(), monkeypatch)
    assert [t.label for t in again.front] == [t.label for t in alone.front]


def test_a_trial_that_a_sampler_elsewhere_is_just_choosing_is_no_configuration_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autobatch.choosing.workers._GRACE_S", 0.3)  # it is cut after that
    storage = optuna.storages.InMemoryStorage()
    fake_sweep(FakeBench(), monkeypatch, storage=storage, trials=3)
    study = optuna.load_study(study_name="autobatch", storage=storage)
    among: Any = study.trials[0].distributions["checkpointing"]
    study.ask().suggest_categorical("checkpointing", among.choices)
    bench = FakeBench()
    assert fake_sweep(bench, monkeypatch, storage=storage).left == 0
    assert len(bench.ran) == len(set(bench.ran))


def test_labels_that_are_drawn_at_random_are_no_other_run(tmp_path: Path) -> None:
    def tried(seed: int) -> Any:
        torch.manual_seed(seed)
        sample = torch.randn(8, 16), torch.randint(1000, (8,))
        model = nn.Linear(16, 1000)
        options = {"target": 32, "gpu": "l4", "levers": ["offload"]}
        return autobatch.sweep(model, sample=sample, storage=storages(tmp_path)[0], **options)

    assert tried(1).trials == tried(2).trials


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1])
def test_a_killed_sweep_resumes_and_runs_again_what_was_cut(kind: int, tmp_path: Path) -> None:
    storage, log = storages(tmp_path)[kind], tmp_path / "log"
    Path(f"{log}.go").touch()
    command = [sys.executable, "-m", "tests.support.sweeps", "sweep", storage, str(log)]
    worker = subprocess.Popen([*command, "0.4"], cwd=ROOT)
    while not log.exists() or len(log.read_text().splitlines()) < 4:
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert states(storage)[TrialState.RUNNING] == 1
    done = log.read_text().splitlines()
    subprocess.run([*command, "0"], cwd=ROOT, check=True)
    assert states(storage)[TrialState.RUNNING] == 0
    ran = [line.partition(" ")[2] for line in log.read_text().splitlines()]
    times = Counter(ran)
    cut = done[-1].partition(" ")[2]
    assert times.pop(cut) == 2
    assert set(times.values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1])
def test_two_workers_share_a_study_and_never_run_a_trial_twice(kind: int, tmp_path: Path) -> None:
    storage, log = storages(tmp_path)[kind], tmp_path / "log"
    command = [sys.executable, "-m", "tests.support.sweeps", "sweep", storage, str(log), "0.05"]
    workers = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    while not all(Path(f"{log}.{worker.pid}").exists() for worker in workers):
        time.sleep(0.01)
    Path(f"{log}.go").touch()
    answers = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    lines = [line.partition(" ") for line in log.read_text().splitlines()]
    assert {int(pid) for pid, _, _ in lines} == {worker.pid for worker in workers}
    assert set(Counter(what for _, _, what in lines).values()) == {1}
    assert answers[0] == answers[1]  # both waited for what the other one ran


@pytest.mark.slow
def test_a_study_about_another_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = storages(tmp_path)[0]
    fake_sweep(FakeBench(), monkeypatch, storage=storage, trials=3)
    for other, said in (
        ({"target": 32}, "target: 64 there, 32 here"),
        ({"gpu": "a100-40gb"}, "gpu"),
        ({"levers": ["checkpointing", "allocator"]}, "levers"),
        ({"optimizer": "sgd"}, "options"),
        ({"headroom": 0.3}, "headroom"),
    ):
        with pytest.raises(UsageError, match=f"{said}.*begin anew with study='another name'"):
            fake_sweep(FakeBench(), monkeypatch, storage=storage, **other)
    fake_sweep(FakeBench(), monkeypatch, storage=storage, trials=3)
    fake_sweep(FakeBench(), monkeypatch, storage=storage, trials=3, study="another", target=32)


def clip(trial: Any, norm: float = 1.0) -> Any:
    value = trial.suggest_categorical("clip", ["off", "on"])
    return lambda setup: setup if value == "off" else setup.having(clip_norm=norm)


def test_a_study_of_another_lever_of_the_same_name_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"storage": optuna.storages.InMemoryStorage(), "trials": 5}
    fake_sweep(FakeBench(), monkeypatch, levers=[partial(clip, norm=2.0)], **options)
    fake_sweep(FakeBench(), monkeypatch, levers=[partial(clip, norm=2.0)], **options)
    said = r"own levers: .*clip.norm: '2.0' there, '3.0' here\): begin anew with study="
    with pytest.raises(UsageError, match=said):
        fake_sweep(FakeBench(), monkeypatch, levers=[partial(clip, norm=3.0)], **options)


def test_a_study_of_a_model_or_loss_whose_code_was_another_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tried(**options: Any) -> None:
        monkeypatch.setattr(module, "bench_of", lambda *_: FakeBench())
        sweep(network(8, 2), target=64, gpu="t4", storage=storage, trials=5, **options)

    storage = optuna.storages.InMemoryStorage()
    tried(levers=["checkpointing"])
    tried(levers=["checkpointing"])
    monkeypatch.setattr(Block, "forward", lambda self, x: x + self.back(self.wide(x)))
    with pytest.raises(UsageError, match=r"\(code: .*Block\.forward \(code\)\): begin anew"):
        tried(levers=["checkpointing"])


def test_trials_that_are_up_before_anything_fits_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"none of 1 configuration fits: the smallest, as it is at micro-batch 64, needs 33.0 GiB"
    with pytest.raises(DoesNotFitError, match=said) as error:
        fake_sweep(FakeBench(), monkeypatch, trials=1)
    assert "34 were not looked at: allow more trials or time" in str(error.value)


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("mine")


def test_a_run_that_fails_as_it_is_raises() -> None:
    with pytest.raises(WorkloadError, match="mine"):
        sweep(Fails(), target=4, sample=torch.zeros(2, 4), gpu="t4", levers=["precision"])


def test_a_lever_with_which_a_run_fails_is_told_and_given_up() -> None:
    def breaks(trial: Any) -> Any:
        def broken(model: nn.Module) -> None:
            raise RuntimeError("this lever breaks")

        if trial.suggest_categorical("mine", ["as it is", "broken"]) == "broken":
            return lambda setup: setup.changed(broken)
        return lambda setup: setup

    found = sweep(nn.Linear(4, 4), target=8, gpu="t4", levers=[breaks])
    assert found.count("failed") == 2 and found.count("finished") >= 1
    failed = next(trial for trial in found.trials if trial.outcome == "failed")
    assert failed.reason is not None and "this lever breaks" in failed.reason
    warned = str(found).partition("Warnings")[2].partition("Notes")[0]
    assert "2 configurations failed, such as mine: broken" in " ".join(warned.split())


def test_nothing_that_fits_says_what_comes_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = FakeBench()
    bench.budget_bytes = GIB
    with pytest.raises(DoesNotFitError, match=r"none of .* configurations fits: the smallest, .*"):
        fake_sweep(bench, monkeypatch)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"trials": 0}, "trials is 0: give a number above 0"),
        ({"trials": True}, "give a number above 0"),
        ({"trials": 1.5}, "give a number above 0, a whole one"),
        ({"trials": "3"}, "give a number above 0"),
        ({"timeout": -1.0}, "give a number above 0"),
        ({"timeout": "3"}, "give a number above 0"),
        ({"timeout": float("nan")}, "timeout is nan: give a number above 0"),
        ({"timeout": 10**5000}, "timeout is an int: give a number above 0"),
        ({"seed": "a"}, "seed is 'a': give a whole number from 0"),
        ({"seed": -1}, "seed is -1: give a whole number from 0"),
        ({"sampler": 5}, "sampler is a int: use a name"),
        ({"study": 5}, "study is 5: give its name"),
        ({"storage": 5}, "storage is 5: name one"),
    ],
)
def test_arguments_that_are_none_are_told(wrong: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        sweep(nn.Linear(4, 4), target=4, gpu="t4", levers=["precision"], **wrong)


def test_a_sampler_that_cannot_propose_this_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unable(optuna.samplers.RandomSampler):
        def sample_independent(self, *_: Any) -> Any:
            raise ValueError("one objective only")

    with pytest.raises(UsageError, match=r"the Unable cannot propose .*one objective only"):
        fake_sweep(FakeBench(), monkeypatch, sampler=Unable())


def test_a_card_of_unknown_speed_is_refused() -> None:
    with pytest.raises(UsageError, match="the speed of 24GiB is not known"):
        sweep(nn.Linear(4, 4), target=4, gpu="24GiB")


def test_progress_tells_of_each_configuration_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Progress] = []
    bench = FakeBench()
    found = fake_sweep(bench, monkeypatch, progress=told.append)
    sizes = [step.micro_batch for step in told if step.micro_batch is not None]
    assert sizes == [size for _, size in bench.ran]
    assert all(step.executions <= step.expected for step in told)
    assert told[-1].executions == len(found.trials)


@pytest.mark.parametrize(("trials", "most"), [(None, 35), (12, 12)])
def test_progress_is_counted_up_to_what_it_goes_to(
    trials: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Progress] = []
    monkeypatch.setattr(module, "_WHOLE", 300 if trials is None else 10)
    fake_sweep(FakeBench(), monkeypatch, progress=told.append, trials=trials, seed=0)
    counts = [step.executions for step in told]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == most
    assert {step.expected for step in told} == {most + 1}


class Card:
    """A card that is there: half of what its simulation says fits does."""

    is_simulated = False
    default_headroom = 0.0
    usable_bytes = 16 * GIB
    evidence = "measured"

    def __init__(self) -> None:
        self.measured: list[int] = []
        self.foreseen: list[int] = []

    def simulated(self) -> Any:
        return SimpleNamespace(run=self._simulate, spec=None, evidence="simulated")

    def hosting(self, workload: Any) -> Any:
        return nullcontext()

    def run(self, workload: Any, *, micro_batch: int, accumulation_steps: int) -> Any:
        self.measured.append(micro_batch)
        self.steps = accumulation_steps
        return self._run(2 * micro_batch * GIB, window_seconds=0.5)

    def _simulate(self, workload: Any, *, micro_batch: int, accumulation_steps: int) -> Any:
        self.foreseen.append(micro_batch)
        return self._run(micro_batch * GIB)

    def _run(self, reserved: int, window_seconds: float | None = None) -> Any:
        return SimpleNamespace(
            replay=SimpleNamespace(peak_reserved_bytes=reserved),
            shortage=None,
            fits=lambda budget: reserved <= budget,
            window_seconds=window_seconds,
        )


def configuration(size: int, steps: int) -> Any:
    split = SimpleNamespace(accumulation_steps=steps)
    settings = AllocatorSettings.of_environment()
    workload = SimpleNamespace(stream=())
    setup = SimpleNamespace(workload=workload, settings=settings, in_force=nullcontext)
    return SimpleNamespace(setup=setup, split=split, micro_batch=size)


def test_what_the_simulation_says_does_not_fit_never_runs_on_the_card() -> None:
    card: Any = Card()
    bench = GpuBench(card, 64, None)
    tried = bench.run(configuration(17, 4))
    assert (tried.fits, tried.executions, tried.simulations) == (False, 0, 1)
    assert (
        tried.reason
        == "it needs 17.0 GiB of 16.0 GiB by the simulation; it was not run on the card"
    )
    assert card.measured == [] and card.foreseen == [17]
    tried = bench.run(configuration(9, 4))
    assert (tried.fits, tried.executions, tried.seconds) == (False, 1, None)
    tried = bench.run(configuration(8, 4))
    assert (tried.fits, tried.executions, tried.seconds) == (True, 1, 0.5)
    tried = bench.run(configuration(1, 64))  # timed over 8 of the 64 micro-batches
    assert (tried.seconds, card.steps) == (4.0, 8)
    other = configuration(1, 1)
    other.setup.settings = AllocatorSettings(expandable_segments=True)
    with pytest.raises(UsageError, match="set PYTORCH_CUDA_ALLOC_CONF before it starts"):
        bench.run(other)


def test_a_sweep_reads_well_and_keeps_its_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = fake_sweep(FakeBench(), monkeypatch)
    text = str(found)
    assert text.startswith("fastest: as it is, micro-batch 16\n")
    assert "Front of speed (estimate) against memory (simulated)" in text
    assert f"{found.executions} runs on the simulated card" in " ".join(text.split())
    document = json.loads(found.to_json())
    assert document["best"]["micro_batch"] == found.best.micro_batch == 16
    assert document["front"] == [trial.number for trial in found.front]
    assert len(document["trials"]) == len(found.trials)
    assert Plan.from_json(json.dumps(document["plan"])) == found.plan
    frame = found.to_frame()
    assert len(frame) == len(found.trials)
    assert frame["on_front"].sum() == len(found.front)
    assert set(frame["checkpointing"]) >= {"as it is", "every block"}
    page = found.report(tmp_path / "report")
    assert page.read_text().count("<svg") == 1
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {
        "report.html", "report.md", "sweep.json", "plan.json", "trials.csv", "charts"
    }  # fmt: skip
    assert found.save(tmp_path / "again.json").read_text() == found.to_json()
    assert repr(found).startswith("<Sweep of Sequential on t4: ")


def test_the_code_of_the_best_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = FakeBench()
    monkeypatch.setattr(
        FakeBench,
        "run",
        lambda self, configuration: module_tried(configuration),
    )
    found = fake_sweep(bench, monkeypatch)
    assert found.best.label == "checkpointing: every block"
    assert "What to change" in str(found)
    assert found.code["checkpointing: every block"] in found.to_json().encode().decode(
        "unicode_escape"
    )


def module_tried(configuration: Any) -> Any:
    from autobatch.choosing.bench import Tried

    is_faster = configuration.settings["checkpointing"] == "every block"
    return Tried(fits=True, reserved_bytes=MIB, seconds=1.0 if is_faster else 2.0)


def test_without_optuna_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "autobatch.choosing.study", raising=False)
    monkeypatch.delattr("autobatch.choosing.study", raising=False)
    with pytest.raises(UsageError, match=r"optuna is not installed: pip install .*\[sweep\]"):
        sweep(nn.Linear(4, 4), target=4, gpu="t4")


def test_a_gain_that_is_none_is_not_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from autobatch.choosing.bench import Tried

    def run(self: Any, configuration: Any) -> Any:
        is_changed = "every block" in configuration.settings.values()
        return Tried(fits=True, reserved_bytes=MIB if is_changed else GIB, seconds=1.0)

    monkeypatch.setattr(FakeBench, "run", run)
    text = " ".join(str(fake_sweep(FakeBench(), monkeypatch)).split())
    assert text.startswith("fastest: checkpointing: every block, micro-batch")
    assert "window 1 s (estimate), no less than as it is at its fastest" in text


def test_the_chart_shows_what_finished_and_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    from autobatch.report.charts.pareto import pareto_chart

    found = fake_sweep(FakeBench(), monkeypatch)
    chart = pareto_chart(found)
    assert len(chart.points) == found.count("finished")
    assert [point.seconds for point in chart.front] == [trial.seconds for trial in found.front]
    assert {point.is_as_it_is for point in chart.points} == {True, False}
    assert (chart.time, chart.memory) == ("estimate", "simulated")
