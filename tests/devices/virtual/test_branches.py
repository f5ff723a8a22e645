"""Code that branches on values that are not known: what needs most memory is taken, and said."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import autobatch
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.devices.virtual.unknown_floats import UnknownFloat
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.trace import Trace
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from tests.support.seen import Seen

N, WIDTH = 64, 32
ONE = N * WIDTH * 4


def run(loss):
    model = nn.Linear(WIDTH, WIDTH)
    workload = Workload(model=model, batch=batch_builder(torch.zeros(2, WIDTH)), loss=loss)
    return VirtualGpu(find_gpu("t4")).run(workload, micro_batch=N, accumulation_steps=1)


def saved(trace: Trace) -> int:
    """Bytes of activations when the backward pass begins."""
    begin = next(mark.event for mark in trace.marks if mark.phase == "backward")
    return trace.by_category(begin - 1)["activations"]


def longer(y):
    return y.tanh().sigmoid().exp().sum()


def above(model, x):
    y = model(x)
    return longer(y) if y.mean() > 0.7 else y.sum()


def below(model, x):
    y = model(x)
    return longer(y) if y.mean() < 0.5 else y.sum()


def item(model, x):
    y = model(x)
    return longer(y) if 2 * y.mean().item() + 1 > 100 else y.sum()


def loop(model, x):
    y = model(x)
    for _ in range(3):
        if y.abs().max().item() < 1:
            break
        y = y.tanh()
    return y.sum()


def otherwise(model, x):
    y = model(x)
    return y.sum() if (y > 0).all() else longer(y)


@pytest.mark.parametrize("loss", [above, below, item, loop, otherwise])
def test_the_branch_that_needs_most_is_taken_and_said(loss):
    ran = run(loss)
    assert saved(ran.trace) >= 3 * ONE
    plan = autobatch.tune(
        nn.Linear(WIDTH, WIDTH), target=8, sample=torch.zeros(2, WIDTH), loss=loss, gpu="t4"
    )
    assert plan.method == "trace model"
    said = [note for note in ran.notes if "decides how much memory is needed" in note]
    assert said and all("test_branches.py" in note for note in said)


def test_a_branch_that_fails_is_none_and_what_is_logged_is_no_branch():
    runs = Seen()

    def loss(model, x):
        runs.append("run")
        y = model(x)
        if torch.isnan(y).any() or not torch.isfinite(y).all() or y.isinf().sum() > 0:
            return longer(y)
        runs.append(f"{y.mean().item():.3f} {y.std().item() / 2 + 1}")
        return y.sum()

    ran = run(loss)
    assert runs.count("run") == 2  # two windows, once
    assert not ran.notes and saved(ran.trace) < ONE

    def guarded(model, x):
        y = model(x)
        if y.mean() > 0.7:
            raise ValueError("too large")
        return y.sum()

    assert not run(guarded).notes


def test_a_loop_that_would_not_end_the_other_way_is_given_up():
    def loss(model, x):
        y = model(x)
        while y.mean().item() < 0.5:
            y = y + 1
        return y.sum()

    assert run(loss).is_free


def test_counts_of_what_holds_are_all_at_most():
    def loss(model, x):
        y = model(x)
        above = int((y[:, 0] > 5).sum())
        return y.new_zeros(above, 100, requires_grad=True).exp().sum() + y.sum()

    ran = run(loss)
    assert saved(ran.trace) >= N * 100 * 4
    assert any(f"taken to be {N}" in note for note in ran.notes)


def test_a_whole_number_without_bounds_is_named_where_it_is_read():
    def loss(model, x):
        y = model(x)
        longest = int((y.abs() * 100).long().max())
        return y.sum() + y.new_zeros(longest).sum()

    (said,) = run(loss).notes
    assert "a whole number that is not known was read" in said and "test_branches.py" in said


def test_a_whole_number_without_bounds_is_named_where_it_is_compared():
    def loss(model, x):
        y = model(x)
        longest = (y.abs() * 100).long().max()
        return y.sum() + y.new_zeros(int(max(longest, 5))).sum()

    (said,) = run(loss).notes
    assert "a whole number that is not known was read" in said


def test_a_tensor_is_equal_to_itself_and_a_factorization_succeeds_without_a_second_run():
    runs = Seen()

    def loss(model, x):
        runs.append("run")
        y = model(x)
        factor, info = torch.linalg.cholesky_ex(y.T @ y)
        if not torch.equal(y, y) or torch.equal(y, y[1:]) or torch.any(info):
            return longer(y)
        return factor.sum()

    assert not run(loss).notes and len(runs) == 2  # two windows, once


def test_an_unknown_float_is_a_float():
    told = []
    number = UnknownFloat.made(0.5, lambda: told.append(1))
    assert json.dumps({"loss": number}) == '{"loss": 0.5}' and f"{number:.2f}" == "0.50"
    assert type(copy.deepcopy(number)) is float and isinstance(1 - number, UnknownFloat)
    assert torch.tensor([number]).dtype is torch.float32 and not told
    assert (3 - 2 * number) > 1 and told == [1]
    assert divmod(number, 1)[0] == 0.0 and {number: 1}[0.5] == 1
    assert max(number, 0.1) == 0.5 and len(told) > 1


MANY = 2**20
"""More elements than are kept as values."""


def of_ones(change):
    def loss(model, x):
        mask = torch.ones(MANY, device=x.device)
        change(mask)
        is_whole = mask.to(torch.bool).all() and mask.sum() == MANY
        return model(x).sum() if is_whole else longer(model(x))

    return loss


def test_a_tensor_of_one_number_reads_as_that_number():
    found = run(of_ones(lambda mask: None))
    assert saved(found.trace) == saved(run(lambda model, x: model(x).sum()).trace)
    assert not any("read at" in note for note in found.notes)


@pytest.mark.parametrize(
    "write",
    [
        lambda mask: mask.mul_(2),
        lambda mask: mask[1:].zero_(),
        lambda mask: mask.view(2, -1)[0].copy_(torch.rand(MANY // 2, device=mask.device)),
        lambda mask: mask.index_fill_(0, torch.tensor([3], device=mask.device), 0),
    ],
)
def test_until_it_is_written_to(write):
    longest = saved(run(lambda model, x: longer(model(x))).trace)
    assert saved(run(of_ones(write)).trace) == longest
