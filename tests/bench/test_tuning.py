"""`tune` without a card's name: it measures the GPU that is there."""

from __future__ import annotations

import pytest

from autobatch.support.units import GIB
from tests.bench.children import answer, needs_bench

pytestmark = needs_bench


def assert_exact(plan: dict) -> None:
    assert plan["proven"]  # what is promised was executed, and one more did not fit
    assert plan["evidence"] == "measured"
    assert plan["ooms_below"] == []
    assert plan["reserved"] <= plan["budget"]
    assert plan["left"] == 0
    assert not [warning for warning in plan["warnings"] if "memory grows" in warning]


@pytest.mark.slow
def test_ceilings_are_exact_wherever_the_model_is() -> None:
    plans = answer("tuned", capacity="2GiB")
    for plan in plans.values():
        assert_exact(plan)
        assert plan["capacity"] == 2 * GIB
    assert plans["isolated"]["ceiling"] == plans["on the host"]["ceiling"]
    assert plans["on the card"]["ceiling"] == plans["on the host"]["ceiling"]
    assert plans["bf16"]["ceiling"] > plans["on the host"]["ceiling"] > plans["fraction"]["ceiling"]
    [held] = [w for w in plans["isolated beside"]["warnings"] if "on the GPU" in w]
    assert "the process that asked holds 806 MiB of 2.00 GiB itself" in held
    assert plans["fraction"]["reserved"] <= 0.6 * 2 * GIB


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    ["expandable_segments:True", "max_split_size_mb:64,garbage_collection_threshold:0.8"],
)
def test_ceilings_are_exact_under_other_settings_of_the_allocator(setting: str) -> None:
    plans = answer(
        "tuned",
        "on the card",
        "bf16",
        variables={"PYTORCH_CUDA_ALLOC_CONF": setting},
        capacity="2GiB",
    )
    for plan in plans.values():
        assert_exact(plan)


@pytest.mark.slow
def test_blocks_at_the_peak_are_called_as_on_the_simulated_card() -> None:
    found = answer("attributed", capacity="2GiB", gpu="t4")
    # of these, the bench takes what cuDNN keeps for smaller, or a sort's scratch for larger
    for other in ("recurrent", "several inputs"):
        found.pop(other)
    assert len(found) >= 10
    assert len({line for seen in found.values() for line in seen["lines"]}) >= 4
    for kind, seen in found.items():
        assert seen["evidence"] == "measured"
        assert seen["strange modules"] == []
        assert seen["bytes"] > 100_000
        assert seen["only simulated"] == [], kind
