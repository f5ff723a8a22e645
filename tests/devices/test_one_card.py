from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autobatch
from autobatch.devices.one_card import require_card, require_one_card
from autobatch.errors import WorkloadError


class Halves(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def predict(model: Any) -> Any:
    return autobatch.predict(
        model, micro_batch=2, sample=torch.zeros(1, 8), loss=lambda m, b: m(b).mean(), gpu="t4"
    )


def on_current_card(x: Tensor) -> Tensor:
    torch.cuda.set_device(1)
    return x


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.to("cuda:1"),
        lambda x: x.to(torch.device("cuda", 1)),
        lambda x: x.to(device="cuda:1"),
        lambda x: x.to(1),
        lambda x: x.cuda(1),
        lambda x: x + torch.zeros(8, device="cuda:1"),
        lambda x: x + torch.zeros(8, device=1),
        on_current_card,
    ],
)
def test_layers_on_a_second_card_are_refused(between: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(WorkloadError, match="cuda:1, and one card is probed"):
        predict(Halves(between))


def test_the_card_that_is_probed_may_be_named() -> None:
    def named(place: Any) -> Any:
        return predict(Halves(lambda x: x.to(place)))

    found = [named("cuda:0"), named(0), named("cuda"), predict(Halves(lambda x: x.cuda()))]
    assert found == [found[0]] * 4


def test_a_function_that_builds_a_model_on_two_cards_is_refused() -> None:
    def build() -> nn.Module:
        model = Halves(lambda x: x)
        model.second.to("cuda:1")
        return model

    with pytest.raises(WorkloadError, match="cuda:1"):
        predict(build)


def test_a_launched_process_may_use_the_card_that_it_was_given(monkeypatch: Any) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    require_card("cuda:3")
    with pytest.raises(WorkloadError, match="cuda:2"):
        require_card("cuda:2")


def test_parameters_on_two_cards_are_refused() -> None:
    class On:
        def __init__(self, card: str) -> None:
            self.device = torch.device(card)

    class Spread(nn.Module):
        def parameters(self, recurse: bool = True) -> Any:
            return map(On, ("cuda:0", "cuda:1", "cpu"))

    with pytest.raises(WorkloadError, match="cuda:0 and cuda:1"):
        require_one_card(Spread())
    require_one_card(Halves(lambda x: x))
