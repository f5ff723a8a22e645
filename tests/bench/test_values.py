"""Which values are real on simulated cards."""

from __future__ import annotations

import pytest

from tests.bench.children import answer, needs_bench

pytestmark = needs_bench


@pytest.mark.slow
def test_fills_and_copies_are_real_and_a_scaler_sees_no_infinity() -> None:
    found = answer("values", capacity="2GiB")
    for name, values in found["filled"].items():
        assert values == [1] * 7, name
    assert found["zeros"] == 0
    assert found["sent"] == 4950
    assert found["stepped"] == 2
