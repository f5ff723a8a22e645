"""Hooks of gradients run in the check as in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autobatch import check_equivalence
from tests.equivalence.networks import EXACT, found, kinds, mean_square, network, samples


def clip(gradient: Tensor) -> Tensor:
    return gradient.clamp(-0.01, 0.01)


def clip_after(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.clamp_(-0.01, 0.01)


def normalise(gradient: Tensor) -> Tensor:
    return gradient / (gradient.norm() + 1e-12)


def stepping(parameter: Tensor) -> None:
    torch.optim.SGD([parameter], 0.5).step()
    parameter.grad = None


@pytest.mark.parametrize(
    ("register", "hook"),
    [
        ("register_hook", clip),
        ("register_hook", normalise),
        ("register_post_accumulate_grad_hook", clip_after),
        ("register_post_accumulate_grad_hook", stepping),
    ],
    ids=["clip", "normalise", "clip after", "step"],
)
def test_a_hook_that_sees_each_part_is_the_culprit(register: str, hook: Any) -> None:
    model = network()
    for parameter in model.parameters():
        getattr(parameter, register)(hook)
    before = [p.detach().clone() for p in model.parameters()]
    result = check_equivalence(model, samples(), loss=mean_square)
    assert not result.equivalent
    assert found(result) == [("hook", ("0.weight", "0.bias", "2.weight", "2.bias"))]
    assert all(map(torch.equal, model.parameters(), before))
    assert all(p.grad is None for p in model.parameters())


def test_a_hook_in_proportion_changes_no_verdict() -> None:
    model = network()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: 2 * gradient)
    model[2].register_full_backward_hook(lambda *_: None)
    result = check_equivalence(model, samples(), loss=mean_square)
    assert result.equivalent
    assert result.difference < EXACT


def test_a_hook_hides_no_batch_norm() -> None:
    model = network(nn.BatchNorm1d(8))
    for parameter in model.parameters():
        parameter.register_hook(clip)
    assert kinds(check_equivalence(model, samples(), loss=mean_square)) == ["hook", "batchnorm"]


class Prototypes(nn.Module):
    """A loss with parameters, with which samples interact or not."""

    def __init__(self, *, mixes: bool) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.prototypes, self.mixes = nn.Parameter(torch.randn(5, 3)), mixes

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        apart = torch.cdist(out, self.prototypes).logsumexp(1).mean()
        own = (self.prototypes * out.detach().mean(0)).sum().square()
        return apart + own if self.mixes else apart


@pytest.mark.parametrize("mixes", [False, True])
def test_parameters_of_the_loss_are_compared(mixes: bool) -> None:
    result = check_equivalence(network(), samples(), loss=Prototypes(mixes=mixes))
    assert result.equivalent is not mixes
    assert "loss.prototypes" in result.parameters
    assert (result.parameters["loss.prototypes"] > 1e-3) is mixes


def test_sparse_gradients_are_compared() -> None:
    model = nn.Sequential(nn.Embedding(20, 6, sparse=True), nn.Linear(6, 3))
    result = check_equivalence(
        model, torch.randint(0, 20, (16, 4)), loss=lambda m, b: m(b).square().mean()
    )
    assert result.equivalent
    assert result.difference < EXACT


def test_a_teacher_that_follows_in_the_forward_pass_is_put_back() -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.student, self.teacher = nn.Linear(6, 3), nn.Linear(6, 3).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            self.teacher.weight.data.mul_(0.9).add_(0.1 * self.student.weight.data)
            out: Tensor = self.student(x) * self.teacher(x)
            return out

    result = check_equivalence(Teacher(), samples(), loss=mean_square)
    assert result.equivalent is False  # the teacher moves once for each micro-batch
    again = check_equivalence(Teacher(), samples(), loss=mean_square)
    assert again.difference == result.difference
