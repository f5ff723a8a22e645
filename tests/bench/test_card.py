"""What PyTorch sees of simulated cards."""

from __future__ import annotations

import pytest

from autobatch.gpus.catalogue import CATALOGUE
from autobatch.support.units import GIB, MIB
from tests.bench.card import environment
from tests.bench.children import answer, needs_bench

pytestmark = needs_bench


@pytest.mark.slow
def test_pytorch_sees_the_cards_and_runs_out_of_their_memory() -> None:
    seen = answer("look", gpu="h100-80gb", capacity="8GiB", cards=2)
    assert seen["names"] == ["NVIDIA H100 80GB HBM3"] * 2
    assert seen["capability"] == [9, 0]
    assert seen["total"] == 8 * GIB
    assert seen["multiprocessors"] == CATALOGUE["h100-80gb"].multiprocessors
    workspaces = 2 * 32 * MIB  # of cuBLAS: of this thread and of autograd's
    assert seen["allocated"] - workspaces - 2 * 4 * MIB in range(MIB)
    context = CATALOGUE["h100-80gb"].context_bytes
    assert seen["in_use"][0] > context + seen["allocated"]
    assert seen["in_use"][1] == context + 2 * MIB
    assert "GPU 0 has a total capacity of 8.00 GiB" in seen["message"]
    assert seen["sent_to"] == "cuda:1"


@pytest.mark.slow
def test_a_process_sees_the_cards_that_it_is_told_to_see() -> None:
    seen = answer("look", variables={"CUDA_VISIBLE_DEVICES": "2,0,9"}, gpu="l4", cards=3)
    assert seen["names"] == ["NVIDIA L4"] * 2


def test_a_card_that_pytorch_has_no_code_for_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"no code for p100-16gb of compute capability 6\.0"):
        environment(gpu="p100-16gb")


def test_there_are_at_most_sixteen_cards() -> None:
    with pytest.raises(ValueError, match="17 cards: the bench plays 1 to 16"):
        environment(cards=17)
