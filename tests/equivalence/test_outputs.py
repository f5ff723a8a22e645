"""A loss that agrees at the outputs of now is looked at where training takes them, too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autobatch import check_equivalence

Loss = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]


def samples() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(8, 6), torch.randint(3, (8,))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def each(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def hard_examples(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    losses = each(model, batch)
    return losses[losses > 0.05].mean()


def hard_examples_by_mask(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    losses = each(model, batch)
    return (losses * (losses > 0.05)).sum() / (losses > 0.05).sum()


def flooding(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (each(model, batch).mean() - 0.1).abs() + 0.1


def flooded_squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    target = F.one_hot(batch[1], 3).double()
    return (F.mse_loss(model(batch[0]), target) - 1e-3).abs()


def larger_of_two(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    out = model(batch[0])
    return torch.maximum(F.cross_entropy(out, batch[1]), 1e-2 * out.square().mean())


def active_margins(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    out = model(batch[0])
    losses = (2 + out[:, 1] - out[:, 0]).clamp(min=0)
    return losses.sum() / (losses > 0).sum().clamp(min=1)


@pytest.mark.parametrize(
    "loss",
    [
        hard_examples,
        hard_examples_by_mask,
        flooding,
        flooded_squares,
        larger_of_two,
        active_margins,
    ],
    ids=lambda loss: loss.__name__,
)
def test_what_outputs_select_is_no_mean_over_samples(loss: Loss) -> None:
    result = check_equivalence(network(), samples(), loss=loss)
    assert result.difference < 1e-9  # by the outputs of now alone nothing is seen
    assert result.equivalent is False
    assert [culprit.kind for culprit in result.culprits] == ["loss"]
    assert not any("weight=" in note for note in result.notes)


def hinge(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.multi_margin_loss(model(batch[0]), batch[1])


def clamped(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return each(model, batch).clamp(0.1, 2.0).mean()


def focal(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    losses = each(model, batch)
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def sure_labels_over_all(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    out = model(batch[0])
    sure = out.detach().softmax(1).amax(1) > 0.35
    return (F.cross_entropy(out, out.detach().argmax(1), reduction="none") * sure).mean()


@pytest.mark.parametrize(
    "loss", [hinge, clamped, focal, sure_labels_over_all], ids=lambda loss: loss.__name__
)
def test_a_mean_over_all_samples_is_equivalent_wherever_the_outputs_are(loss: Loss) -> None:
    result = check_equivalence(network(), samples(), loss=loss)
    assert result.equivalent, str(result)
