"""Hooks of the user's that see parts of a gradient: which ones a window tells of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autobatch import AutobatchWarning, windows
from autobatch.accumulate.hooks import note_on_hooks

MASK = torch.tensor([1.0, 0.0, 1.0])
Hook = Callable[[Tensor], Any]


def first_is_frozen(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[0] = 0
    return gradient


class Masked(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", MASK)

    def hook(self, gradient: Tensor) -> Tensor:
        return gradient * self.mask.to(gradient.device)


def closed_over(mask: Tensor) -> Hook:
    return lambda gradient: gradient.mul(mask.type_as(gradient))


def by_default(gradient: Tensor, call: Any = torch.sign) -> Any:
    return call(gradient)


def a_call_closed_over() -> Hook:
    clip = partial(torch.clamp, min=-1, max=1)
    return lambda gradient: clip(gradient)


def noted(hook: Hook) -> bool:
    weight = nn.Parameter(torch.ones(3))
    weight.register_hook(hook)
    return note_on_hooks([weight]) is not None


PRODUCTS: list[Hook] = [
    lambda gradient: gradient * MASK,
    lambda gradient: gradient * 0.5,
    lambda gradient: -gradient,
    lambda gradient: gradient / 3,
    lambda gradient: torch.mul(gradient, MASK),
    lambda gradient: torch.zeros_like(gradient),
    first_is_frozen,
    Masked().hook,
    closed_over(MASK),
]

OTHERS: list[Hook] = [
    lambda gradient: gradient.clamp(-1, 1),
    lambda gradient: torch.clamp(gradient, -1, 1),
    lambda gradient: F.normalize(gradient, dim=0),
    lambda gradient: gradient / gradient.norm(),
    lambda gradient: gradient + 0.1 * MASK,
    lambda gradient: gradient * (gradient > 0),
    lambda gradient: gradient if gradient.sum() else None,
    by_default,
    a_call_closed_over(),
]


@pytest.mark.parametrize("hook", PRODUCTS)
def test_a_hook_that_multiplies_is_not_told(hook: Hook) -> None:
    assert not noted(hook)


@pytest.mark.parametrize("hook", OTHERS)
def test_a_hook_that_may_do_something_else_to_parts_is_told(hook: Hook) -> None:
    assert noted(hook)


def test_hooks_of_libraries_are_not_told() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.register_hook(partial(nn.functional.relu, inplace=False))
    weight.register_post_accumulate_grad_hook(nn.utils.clip_grad_norm_)
    assert note_on_hooks([weight]) is None


def test_any_hook_on_the_sum_that_has_accumulated_is_told() -> None:
    """What multiplies it does so again in each micro-batch."""
    weight = nn.Parameter(torch.ones(3))
    weight.register_post_accumulate_grad_hook(lambda parameter: parameter.grad.mul_(0.5))
    assert note_on_hooks([weight, nn.Parameter(torch.ones(1))]) == (
        "1 of 2 parameters has a gradient hook of yours (<lambda>): with several micro-batches it "
        "sees parts of the gradient, which changes what clipping or adding something does; change "
        "the gradients between `for batch in window` and window.step() instead, or see by "
        "autobatch.check_equivalence that it is no matter"
    )


def test_windows_warn_of_hooks_once_and_only_where_they_see_parts() -> None:
    model = nn.Linear(3, 1)
    model.weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def said(steps: int) -> list[Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batches = torch.ones(8, 3).split(4)
            run = windows(batches, optimizer, micro_batch=4 // steps, accumulation_steps=steps)
            for window in run:
                window.run(lambda batch: model(batch).square().mean())
                window.step()
        return [each for each in caught if each.category is AutobatchWarning]

    assert not said(1)
    (warning,) = said(4)
    assert "1 of 2 parameters has a gradient hook of yours (<lambda>)" in str(warning.message)
    assert warning.filename == __file__
