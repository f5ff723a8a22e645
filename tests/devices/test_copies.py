"""Copies of the user's objects run, and the originals are left alone."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autobatch.devices.copies import flatten_weights_as
from autobatch.errors import WorkloadError
from tests.support.simulated import (
    WIDTH,
    largest,
    mlp,
    nbytes,
    run,
)


def test_tied_weights_are_counted_once():
    tied = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    tied[1].weight = tied[0].weight
    assert largest(run(tied), "parameters") == nbytes(tied)


def test_a_loss_may_hold_tensors_of_its_own():
    weights = torch.rand(WIDTH)

    def closure(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        labels = torch.zeros(batch.size(0), dtype=torch.int64, device=batch.device)
        return F.cross_entropy(model(batch), labels, weight=weights)

    assert largest(run(mlp(), loss=closure), "parameters") == nbytes(mlp())


def test_modules_in_a_loss_closure_are_neither_moved_nor_changed():
    teacher = mlp()

    def distil(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        teacher.to(batch.device).eval()
        return F.mse_loss(model(batch), teacher(batch).detach())

    before = [p.clone() for p in teacher.parameters()]
    run(mlp(), loss=distil)
    assert teacher.training
    assert all(type(p) is nn.Parameter for p in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_an_optimizer_that_already_has_state_is_simulated_and_left_alone():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, WIDTH)).sum().backward()
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[model[0].weight].items()}
    trace = run(model, optimizer=optimizer)
    assert largest(trace, "optimizer_state") == 2 * nbytes(model)
    after = optimizer.state[model[0].weight]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(WorkloadError, match="none of the model's parameters"):
        run(mlp(), optimizer=torch.optim.SGD(mlp().parameters(), lr=0.1))


class Parent:
    """Refers to a part that refers back weakly; both copy themselves, as graphs' data do."""

    def __init__(self) -> None:
        self.part = Part(self)

    def __deepcopy__(self, memo: dict[int, object]) -> Parent:
        made = Parent.__new__(Parent)
        made.part = copy.deepcopy(self.part, memo)
        made.part.parent = weakref.ref(made)
        return made


class Part:
    def __init__(self, parent: Parent) -> None:
        self.parent = weakref.ref(parent)
        self.scale = torch.ones(())

    def __deepcopy__(self, memo: dict[int, object]) -> Part:
        made = Part.__new__(Part)
        made.parent, made.scale = self.parent, copy.deepcopy(self.scale, memo)
        return made


def test_objects_that_refer_back_weakly_are_copied():
    held = Parent()
    scale = held.part.scale

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        assert held.part.parent() is held
        held.part.scale = held.part.scale + 1
        return model(batch).mean() * held.part.scale.to(batch.device)

    run(mlp(), loss=loss)
    assert held.part.scale is scale and held.part.parent() is held


def test_ids_of_parameters_are_those_of_their_copies():
    model = mlp()
    names = {id(p): name for name, p in model.named_parameters()}
    known = set(names)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        assert [names[id(p)] for p in model.parameters()] == [
            n for n, _ in model.named_parameters()
        ]
        assert all(id(p) in known for p in model.parameters())
        return model(batch).mean()

    run(model, loss=loss)
    assert [names[id(p)] for p in model.parameters()] == [n for n, _ in model.named_parameters()]


class Flattened(nn.LSTM):
    """Counts how often its weights are put into one buffer."""

    def __init__(self):
        self.calls = 0
        super().__init__(8, 8)

    def flatten_parameters(self):
        self.calls += 1


def test_weights_of_a_recurrent_layer_are_put_into_one_buffer_as_moving_it_would():
    original, copied = nn.Sequential(nn.LSTM(8, 8), mlp()), nn.Sequential(Flattened(), mlp())
    before = copied[0].calls
    flatten_weights_as(original, copied)
    assert copied[0].calls == before + 1
