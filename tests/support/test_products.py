"""The precision of products is read and put back by whichever of its two names the user sets it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import autobatch
from autobatch.support.products import are_in_tf32, products_in_tf32


def _newer(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision


def _older_then_newer() -> None:
    torch.set_float32_matmul_precision("high")
    _newer("ieee")


SETTINGS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "older": lambda: torch.set_float32_matmul_precision("medium"),
    "newer": lambda: _newer("tf32"),
    "both": _older_then_newer,
}


def _state() -> tuple[str, str]:
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:
        named = "cannot be read"
    return torch.backends.cuda.matmul.fp32_precision, named


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    _newer(before)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("wanted", [False, True])
def test_a_block_has_what_it_wants_and_leaves_all_as_before(name: str, wanted: bool) -> None:
    SETTINGS[name]()
    before = _state()
    with products_in_tf32(wanted):
        assert are_in_tf32() is wanted
    assert _state() == before


@pytest.mark.parametrize("name", SETTINGS)
def test_plans_and_advice_are_given_under_each(name: str) -> None:
    SETTINGS[name]()
    before = _state()
    run = {"target": 8, "sample": torch.zeros(2, 4), "gpu": "a100-40gb"}
    model = nn.Linear(4, 4)
    assert autobatch.tune(model, loss=lambda model, x: model(x).sum(), **run).micro_batch == 8
    advice = autobatch.advise(model, loss=lambda model, x: model(x).sum(), **run)
    offers_tf32 = any("precision: tf32" in choice.options for choice in advice.choices)
    assert offers_tf32 is (before[0] != "tf32")
    assert _state() == before
