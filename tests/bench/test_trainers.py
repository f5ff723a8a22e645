"""Trainers that are tuned for the GPU in the machine train with what the plan says they need."""

from __future__ import annotations

import pytest

from tests.bench.children import answer, needs_bench

pytestmark = needs_bench

CLOSE = 0.01  # a trainer holds a few tensors of its own, and batches that wait


def assert_trained_as_planned(found: dict) -> None:
    assert found["set"] == found["plan"]
    assert found["plan"][1] > 1  # the card is too small for the target at once
    assert found["ooms"] == 0
    assert found["trained"] == pytest.approx(found["planned"], rel=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_transformers_trainer(precision: str) -> None:
    pytest.importorskip("transformers")
    assert_trained_as_planned(answer("trainer", precision, capacity="2GiB"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_lightnings_trainer(precision: str) -> None:
    pytest.importorskip("lightning")
    assert_trained_as_planned(answer("lightning_trainer", precision, capacity="1GiB"))
