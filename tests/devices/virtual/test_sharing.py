from __future__ import annotations

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autobatch.devices.virtual.backend import built_for
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.devices.virtual.questions import questions
from autobatch.devices.virtual.sharing import SharedRuns, SharingGpu
from autobatch.gpus.catalogue import CATALOGUE, find_gpu
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.workload.workload import Workload

FAMILIES = defaultdict(list)
for _card in CATALOGUE.values():
    FAMILIES[_card.compute_capability].append(_card)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5000, 128)
        self.norm = nn.LayerNorm(128)
        self.project = nn.Linear(128, 384)
        self.head = nn.Linear(128, 5000)

    def forward(self, tokens):
        states = self.norm(self.embed(tokens))
        q, k, v = self.project(states).unflatten(-1, (3, 4, 32)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(attended.transpose(1, 2).flatten(2)).sum((0, 1)).softmax(-1).sum()


def convolutions() -> Workload:
    layers = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 64, 3, groups=2)
    )
    return Workload(model=layers, batch=lambda n: torch.zeros(n, 3, 40, 40))


def attention(autocast: str | None = None) -> Workload:
    return Workload(
        model=Attention(),
        batch=lambda n: torch.zeros(n, 96, dtype=torch.int64),
        autocast=autocast,
        clip_norm=1.0,
    )


WORKLOADS = {
    "convolutions": convolutions,
    "attention": attention,
    "attention in bf16": lambda: attention("bf16"),
}


def ran(device, workload, size=6, steps=2):
    return device.run(workload, micro_batch=size, accumulation_steps=steps)


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("family", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_a_run_that_is_taken_over_is_the_one_that_the_card_would_have_run(name, family) -> None:
    workload = WORKLOADS[name]()
    shared = SharedRuns()
    for card in FAMILIES[family]:
        taken, alone = ran(SharingGpu(card, shared), workload), ran(VirtualGpu(card), workload)
        assert taken.trace == alone.trace
        assert taken.replay == alone.replay
        assert (taken.notes, taken.loss, taken.optimizer) == (
            alone.notes,
            alone.loss,
            alone.optimizer,
        )
    assert shared.executions == 1


def test_what_kernels_take_differs_between_cards_that_share_a_run() -> None:
    # the gradient of a bias is a sum over rows, which multiprocessors share
    workload = Workload(model=nn.Linear(8, 3072), batch=lambda n: torch.zeros(n, 700, 8))
    shared = SharedRuns()
    traces = [ran(SharingGpu(find_gpu(gpu), shared), workload).trace for gpu in ("l4", "l40s")]
    assert shared.executions == 1
    assert traces[0] != traces[1]
    assert traces[0].bare.trace == traces[1].bare.trace


def test_cards_of_other_compute_capabilities_run_by_themselves() -> None:
    workload, shared = convolutions(), SharedRuns()
    for gpu in ("t4", "a100-40gb", "h100-80gb"):
        ran(SharingGpu(find_gpu(gpu), shared), workload)
    assert shared.executions == 3


def test_other_sizes_steps_and_workloads_are_other_runs() -> None:
    device = SharingGpu(find_gpu("t4"), shared := SharedRuns())
    workload, other = convolutions(), convolutions()
    for _ in range(2):
        ran(device, workload)
        ran(device, workload, size=7)
        ran(device, workload, steps=1)
        ran(device, other)
    assert shared.executions == 4


def asking(question):
    class Asks(nn.Linear):
        def forward(self, data):
            question()
            return super().forward(data)

    return Workload(model=Asks(8, 8), batch=lambda n: torch.zeros(n, 8))


@pytest.mark.parametrize(
    "question",
    [
        lambda: torch.cuda.get_device_name(0),
        lambda: torch.cuda.mem_get_info(),
        lambda: torch.cuda.get_device_properties(0).total_memory,
        lambda: torch.cuda.get_device_properties(0).name,
    ],
)
def test_a_run_that_asks_for_its_card_is_not_shared(question) -> None:
    workload, shared = asking(question), SharedRuns()
    for gpu in ("a100-40gb", "a100-80gb"):
        ran(SharingGpu(find_gpu(gpu), shared), workload)
    assert shared.executions == 2


def test_a_run_that_asks_for_the_compute_capability_is_shared_by_cards_that_have_it() -> None:
    workload, shared = asking(torch.cuda.get_device_capability), SharedRuns()
    for gpu in ("a100-40gb", "a100-80gb", "t4"):
        ran(SharingGpu(find_gpu(gpu), shared), workload)
    assert shared.executions == 2


def test_a_run_in_which_unknown_values_decide_is_not_shared() -> None:
    class Decides(nn.Linear):
        def forward(self, data):
            states = super().forward(data)
            return torch.cat([states, states]) if states.sum() > 3 else states

    workload, shared = Workload(model=Decides(8, 8), batch=lambda n: torch.ones(n, 8)), SharedRuns()
    cards = [find_gpu(gpu) for gpu in ("a100-40gb", "a100-80gb")]
    runs = [ran(SharingGpu(card, shared), workload) for card in cards]
    assert runs[0].trace == ran(VirtualGpu(cards[1]), workload).trace
    assert shared.executions == sum(1 for _ in cards)


def test_code_that_builds_a_model_is_seen_to_ask() -> None:
    with questions() as asked, built_for(find_gpu("t4")):
        assert torch.cuda.is_available()
        assert not asked
        assert torch.cuda.get_device_properties(0).major == 7
        assert asked == {"capability"}
        assert torch.cuda.get_device_name() == "t4"
        assert asked == {"capability", "card"}


@pytest.mark.parametrize("card", ["a100-40gb", "a100-80gb", "a30"])
def test_another_allocator_replays_what_was_executed(card) -> None:
    workload, shared = convolutions(), SharedRuns()
    ran(SharingGpu(find_gpu("a100-40gb"), shared, AllocatorSettings()), workload)
    settings = AllocatorSettings(expandable_segments=True)
    gpu = find_gpu(card)
    taken = ran(SharingGpu(gpu, shared, settings), workload)
    alone = ran(VirtualGpu(gpu, settings), workload)
    assert (taken.trace, taken.replay) == (alone.trace, alone.replay)
    assert shared.executions == 1


def test_runs_that_are_counted_in_another_precision_are_not_shared() -> None:
    workload, shared = attention(), SharedRuns()
    works = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            works.append(ran(SharingGpu(find_gpu("l4"), shared, counts_work=True), workload).work)
    finally:
        torch.set_float32_matmul_precision(before)
    assert works[0] != works[1]
    assert ran(SharingGpu(find_gpu("l4"), shared), workload).work is None
