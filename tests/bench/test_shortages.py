"""Memory that runs out anywhere in two windows leaves everything of the user's as it was."""

from __future__ import annotations

import pytest

from tests.bench.children import answer, needs_bench

pytestmark = needs_bench


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["", "expandable_segments:True"])
def test_a_shortage_at_any_allocation_changes_nothing(setting: str) -> None:
    runs = answer("short", variables={"PYTORCH_CUDA_ALLOC_CONF": setting}, capacity="4GiB")
    assert [run["short"] for run in runs].count(True) >= 10
    assert not runs[-1]["short"]
    for run in runs:
        assert run["same"] and run["left"] == 0


@pytest.mark.slow
def test_a_model_that_cannot_return_waits_for_the_next_probe() -> None:
    found = answer("no_way_back", capacity="2GiB")
    assert "wait in host memory and cannot return to the GPU" in found["said"]
    assert "free memory there and probe again" in found["said"]
    assert found["empty"] == [False, False, True, True]
    assert found["same"]
