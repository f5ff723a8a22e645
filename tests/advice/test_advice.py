from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autobatch import FileError, UsageError
from autobatch.advice.accumulation import (
    accumulation_rows,
    accumulation_summary,
    extrapolate_peak,
    other_evidence,
)
from autobatch.advice.loop import training_loop
from autobatch.advice.normalization import batchnorm, batchnorm_rows
from autobatch.advice.rates import learning_rate, learning_rate_factors, learning_rate_rule, warm_up
from autobatch.advice.wording import window_text
from autobatch.plan.plan import Plan
from autobatch.records.evidence import WindowMemory
from tests.support.plans import GPU, example_plan, footprint_at, ragged_plan


class Linear(nn.Module):
    """A model under a wrapper that, like DistributedDataParallel, has `no_sync`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1).double()
        self.synced = True
        self.reductions = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.reductions += self.synced
        return self.layer(x)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.synced = False
        yield
        self.synced = True


def run_loop(plan: Plan, data: list[torch.Tensor], seed: int = 0) -> tuple[Linear, list[Any]]:
    """Run the pasted loop for one epoch and return the model and the gradients of each update."""
    torch.manual_seed(seed)
    model = Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    updates: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: updates.append(model.layer.weight.grad.clone()))

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    names = {
        "model": model,
        "optimizer": optimizer,
        "dataset": data,
        "epochs": 1,
        "loss_fn": loss_fn,
    }
    exec(compile(training_loop(plan), "loop", "exec"), names)
    return model, updates


def samples(number: int) -> list[torch.Tensor]:
    return list(torch.randn(number, 3, dtype=torch.double, generator=torch.manual_seed(1)))


def whole_batch_gradient(data: list[torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    model = Linear()
    model(torch.stack(data)).square().mean().backward()
    assert model.layer.weight.grad is not None
    return model.layer.weight.grad


PLAIN = {"autocast": None, "clip_norm": None, "loss": "user"}


@pytest.mark.parametrize("window", [(8,), (4, 4), (3, 3, 2), (2, 1)])
def test_the_pasted_loop_gives_the_gradient_of_the_whole_batch(window: tuple[int, ...]) -> None:
    data = samples(sum(window))
    _, updates = run_loop(ragged_plan(sum(window), (window,), **PLAIN), data)
    assert len(updates) == 1
    torch.testing.assert_close(updates[0], whole_batch_gradient(data))


@pytest.mark.parametrize(
    "windows", [((3, 3), (3, 2)), ((2, 2), (2, 2)), ((3,), (2,)), ((2,), (2,))]
)
def test_the_pasted_loop_is_exact_over_several_gpus(
    windows: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = samples(sum(map(sum, windows)))
    plan = ragged_plan(len(data), windows, **PLAIN)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model: model)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: len(windows))
    gradients = []
    for rank in range(len(windows)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        model, updates = run_loop(plan, data)
        assert (len(updates), model.reductions) == (1, 1)
        gradients.append(updates[0])
    mean = torch.stack(gradients).mean(0)
    torch.testing.assert_close(mean, whole_batch_gradient(data))


@pytest.mark.parametrize("window", [(4, 4), (3, 3, 2), (8,)])
def test_the_pasted_loop_leaves_out_an_incomplete_last_window(window: tuple[int, ...]) -> None:
    _, updates = run_loop(ragged_plan(8, (window,), **PLAIN), samples(2 * 8 + 7))
    assert len(updates) == 2


def test_the_pasted_loop_unscales_before_it_clips() -> None:
    loop = training_loop(ragged_plan(8, ((4, 4),), autocast="fp16", clip_norm=0.5))
    order = [
        "GradScaler",
        "scaler.scale(",
        "unscale_",
        "clip_grad_norm_",
        "scaler.step",
        "update()",
    ]
    positions = [loop.index(part) for part in order]
    assert positions == sorted(positions)
    assert "clip_grad_norm_(model.parameters(), 0.5)" in loop


@pytest.mark.parametrize("autocast", [None, "bf16", "fp16"])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("windows", [((4,),), ((4, 4),), ((4, 3),), ((4,), (3,)), ((4, 4), (4, 4))])
@pytest.mark.parametrize("loss", ["user", "output.loss", "scalar output", "surrogate sum"])
def test_every_form_of_the_loop_is_valid_python(
    autocast: str | None, clip_norm: float | None, windows: Any, loss: str
) -> None:
    plan = ragged_plan(
        sum(map(sum, windows)), windows, autocast=autocast, clip_norm=clip_norm, loss=loss
    )
    loop = training_loop(plan)
    compile(loop, "loop", "exec")
    assert ("autocast(" in loop) == (autocast is not None)
    assert ("clip_grad_norm_" in loop) == (clip_norm is not None)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_a_written_window_names_every_size(window: list[int]) -> None:
    terms = [term.split(" × ") for term in window_text(window).split(" + ")]
    assert [int(t[-1]) for t in terms for _ in range(int(t[0]) if len(t) == 2 else 1)] == window


def test_adam_and_rmsprop_scale_with_the_square_root_and_sgd_linearly() -> None:
    rule: Callable[[str], str | None] = learning_rate_rule
    assert {rule(name) for name in ("Adam", "AdamW", "NAdam", "FusedAdam", "RMSprop")} == {"sqrt"}
    assert rule("SGD") == "linear"
    assert {rule(name) for name in ("Shampoo", "Lion", "Adagrad", "Adafactor")} == {None}


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.sampled_from(["SGD", "AdamW"]))
def test_scaling_a_learning_rate_there_and_back_changes_nothing(a: int, b: int, name: str) -> None:
    there = ragged_plan(a, ((a,),), optimizer=name).scale_lr(0.1, b)
    back = ragged_plan(b, ((b,),), optimizer=name).scale_lr(there, a)
    assert math.isclose(back, 0.1)


def test_a_plan_scales_by_its_optimizers_rule_or_by_the_one_that_is_asked_for() -> None:
    plan = ragged_plan(256, ((64,) * 4,), optimizer="AdamW")
    assert plan.scale_lr(1e-3, 64) == pytest.approx(2e-3)
    assert plan.scale_lr(1e-3, 64, "linear") == pytest.approx(4e-3)
    sgd = ragged_plan(256, ((64,) * 4,), optimizer="SGD")
    assert sgd.scale_lr(0.1, 64) == pytest.approx(0.4)
    assert sgd.scale_lr(0.1, 64, rule="sqrt") == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("lr", "from_batch", "rule", "words"),
    [
        (0.1, 64, "auto", "no rule is established for the learning rate of Shampoo"),
        (0.1, 0, "linear", "from_batch is 0"),
        (math.nan, 64, "linear", "lr is nan"),
        (0.1, 64, "square root", "use 'linear', 'sqrt' or 'auto'"),
    ],
)
def test_what_cannot_be_scaled_is_refused(
    lr: float, from_batch: int, rule: Any, words: str
) -> None:
    plan = ragged_plan(8, ((4, 4),), optimizer="Shampoo")
    with pytest.raises(UsageError, match=words):
        plan.scale_lr(lr, from_batch, rule)


def test_an_optimizer_without_a_rule_gets_no_invented_factor() -> None:
    plan = ragged_plan(8, ((4, 4),), optimizer="Shampoo")
    assert learning_rate_factors(plan) == ()
    assert "no rule is established for Shampoo" in learning_rate(plan)
    assert plan.scale_lr(0.1, 4, "linear") == pytest.approx(0.2)


def test_warm_up_is_counted_in_updates_and_names_its_source() -> None:
    for optimizer, words in (("AdamW", "2,000"), ("SGD", "5 epochs"), ("Shampoo", "authors")):
        text = warm_up(ragged_plan(8, ((4, 4),), optimizer=optimizer))
        assert words in text
        assert "not micro-batches" in text
        assert ("https://arxiv.org" in text) == (optimizer != "Shampoo")


def test_the_extrapolated_peak_continues_the_line() -> None:
    plan = example_plan()
    truth = footprint_at(256).peak_allocated_bytes
    assert extrapolate_peak(plan, 256) == pytest.approx(truth, rel=1e-9)
    assert extrapolate_peak(plan, 64) == footprint_at(64).peak_allocated_bytes


def test_a_single_point_predicts_nothing() -> None:
    plan = example_plan(curve=example_plan().curve[:1])
    assert extrapolate_peak(plan, 256) is None
    assert "unknown" in accumulation_summary(plan)
    assert accumulation_rows(plan)[-1].other_bytes is None


def test_the_parts_with_and_without_accumulation_sum_to_the_peak() -> None:
    for plan in (example_plan(), ragged_plan(64, ((64,),))):
        *parts, total = accumulation_rows(plan)
        assert sum(row.planned_bytes for row in parts) == total.planned_bytes
        assert sum(row.other_bytes or 0 for row in parts) == total.other_bytes


def test_the_other_window_of_a_plan_is_taken_where_the_tuner_knows_it() -> None:
    known = footprint_at(256, "predicted", 1)
    other = WindowMemory(
        micro_batch=256,
        accumulation_steps=1,
        categories=known.categories,
        peak_allocated_bytes=known.peak_allocated_bytes,
        evidence="simulated",
    )
    plan = example_plan(otherwise=other)
    *parts, total = accumulation_rows(plan)
    assert total.other_bytes == known.peak_allocated_bytes
    assert sum(row.other_bytes or 0 for row in parts) == total.other_bytes
    assert other_evidence(plan) == "simulated"
    assert "(simulated)" in accumulation_summary(plan)
    assert "straight line" in accumulation_summary(example_plan())
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(FileError, match="otherwise's categories"):
        Plan.from_json(
            example_plan(otherwise=dataclasses.replace(other, peak_allocated_bytes=7)).to_json()
        )


def test_accumulation_leaves_weights_and_optimizer_state_alone_and_saves_activations() -> None:
    weights, optimizer, gradients, activations, peak = accumulation_rows(example_plan())
    assert weights.planned_bytes == weights.other_bytes
    assert optimizer.planned_bytes == optimizer.other_bytes
    assert gradients.planned_bytes == gradients.other_bytes
    assert activations.other_bytes is not None
    assert activations.other_bytes > 3.9 * activations.planned_bytes
    assert peak.other_bytes is not None
    assert peak.other_bytes > GPU.capacity_bytes


def test_batchnorm_is_warned_of_only_where_it_is() -> None:
    assert "no BatchNorm" in batchnorm(ragged_plan(8, ((4, 4),)))
    small = batchnorm(ragged_plan(8, ((4, 4),), batchnorm_layers=53))
    assert "53 BatchNorm layers" in small
    assert "fewer than 16" in small
    whole = batchnorm(ragged_plan(64, ((64,),), batchnorm_layers=1))
    assert "1 BatchNorm layer." in whole
    assert "whole effective batch" in whole
    several = batchnorm(ragged_plan(128, ((64,), (64,)), batchnorm_layers=2))
    assert "SyncBatchNorm" in several


def test_batchnorm_rows_give_the_size_of_statistics_before_and_after() -> None:
    assert batchnorm_rows(ragged_plan(8, ((4, 4),))) == ()
    statistics, moves = batchnorm_rows(ragged_plan(11, ((3, 3), (3, 2)), batchnorm_layers=2))
    assert (statistics.before, statistics.after) == (6, (2, 3))
    assert (moves.before, moves.after) == (1, (2,))
