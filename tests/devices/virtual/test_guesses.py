"""A check that a placeholder fails is run again, read the other way; the plan says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.devices.virtual.guesses import Guesses
from autobatch.errors import WorkloadError
from autobatch.gpus.catalogue import find_gpu
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload

SAMPLE = (torch.randn(4, 16), torch.tensor([[0.1, 0.2, 0.5, 0.7]]).repeat(4, 1))
TIMES = torch.linspace(0, 1, 10)


def boxes(model, batch):
    x, corners = batch
    if (corners[:, 2:] <= corners[:, :2]).any():
        raise ValueError("every box needs a positive height and width")
    return model(x).mean() + (corners[:, 2:] - corners[:, :2]).mean()


def increasing(model, batch):
    t = TIMES.to(batch[0].device)
    assert (t[1:] > t[:-1]).all(), "t must be strictly increasing"
    return sum(model(batch[0]).mean() * step for step in t)


def three_checks(model, batch):
    y = model(batch[0])
    if (y[:, 0] >= y[:, 1]).any():
        raise ValueError("order")
    if y.mean().item() < 1:
        raise ValueError("small")
    assert torch.all(y[:, 1:] > y[:, :-1])
    return y.sum()


def ran(loss):
    workload = Workload(model=nn.Linear(16, 8), batch=batch_builder(SAMPLE), loss=loss)
    return VirtualGpu(find_gpu("t4")).run(workload, micro_batch=4, accumulation_steps=1)


def computed_times(model, batch):
    t = TIMES.to(batch[0].device) * model(batch[0]).mean()
    assert (t[1:] > t[:-1]).all(), "t must be strictly increasing"
    return sum(model(batch[0]).mean() * step for step in t)


def test_times_that_are_known_are_not_guessed():
    assert "test_guesses.py" not in " ".join(ran(increasing).notes)


@pytest.mark.parametrize("loss", [boxes, computed_times, three_checks])
def test_a_check_that_placeholders_fail_is_answered_the_other_way_and_it_is_said(loss):
    notes = " ".join(ran(loss).notes)
    assert "test_guesses.py" in notes
    assert "run again" in notes


def test_a_factorization_succeeds():
    def loss(model, batch):
        y = model(batch[0])
        matrix = y.T @ y + torch.eye(8, device=y.device)
        factor, info = torch.linalg.cholesky_ex(matrix)
        inverse, infos = torch.linalg.inv_ex(matrix)
        if info.any() or infos.item() != 0:
            raise ValueError("the matrix is not positive definite")
        return factor.sum() + inverse.sum()

    assert not any("run again" in note for note in ran(loss).notes)


def test_a_place_that_is_looked_up_by_a_value_is_one_of_the_table():
    def loss(model, batch):
        table = TIMES.to(batch[0].device)
        places = [(table == t).nonzero().item() for t in batch[0][:, 0]]
        return (model(batch[0]) * table[places][:, None]).sum()

    assert ran(loss)


def test_an_error_that_no_read_explains_is_the_first_one():
    def loss(model, batch):
        value = model(batch[0]).mean()
        if value > 0.5:
            raise ValueError("large")
        raise ValueError("small")

    with pytest.raises(WorkloadError, match="ValueError: large"):
        ran(loss)


def test_tries_end():
    guesses = Guesses()
    error = ValueError()
    tries = 0
    while guesses.turn(error):
        tries += 1
        guesses.begin()
        eval(compile("\n" * tries + "guesses.answer(0.6)", f"place {tries}", "eval"))
    assert tries < 20
