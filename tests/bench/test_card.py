"""What PyTorch sees of simulated cards."""

from __future__ import annotations

import json

import pytest

from autobatch.gpus.catalogue import CATALOGUE
from autobatch.support.units import GIB, MIB
from tests.bench.card import environment
from tests.bench.children import needs_bench, said

pytestmark = needs_bench

LOOK = """
    import json, torch
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    weight = torch.zeros(1024, 1024, device="cuda", requires_grad=True)
    (weight @ weight).sum().backward()
    try:
        torch.empty(64 << 30, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        message = str(error)
    print(json.dumps({
        "names": [card.name for card in cards],
        "capability": torch.cuda.get_device_capability(),
        "total": cards[0].total_memory,
        "multiprocessors": cards[0].multi_processor_count,
        "allocated": torch.cuda.memory_allocated(),
        "in_use": [total - free for free, total in map(torch.cuda.mem_get_info, range(len(cards)))],
        "message": message,
    }))
"""


def test_pytorch_sees_the_cards_and_runs_out_of_their_memory() -> None:
    seen = json.loads(said(LOOK, gpu="h100-80gb", capacity="8GiB", cards=2))
    assert seen["names"] == ["NVIDIA H100 80GB HBM3"] * 2
    assert seen["capability"] == [9, 0]
    assert seen["total"] == 8 * GIB
    assert seen["multiprocessors"] == CATALOGUE["h100-80gb"].multiprocessors
    workspaces = 2 * 32 * MIB  # of cuBLAS: of this thread and of autograd's
    assert seen["allocated"] - workspaces - 2 * 4 * MIB in range(MIB)
    context = CATALOGUE["h100-80gb"].context_bytes
    assert seen["in_use"][0] > context + seen["allocated"]
    assert "GPU 0 has a total capacity of 8.00 GiB" in seen["message"]


def test_a_card_that_pytorch_has_no_code_for_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"no code for p100-16gb of compute capability 6\.0"):
        environment(gpu="p100-16gb")
