"""A copy is changed on the host, and is what the changed model would be when it is on the card."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from autobatch.levers.code import ModelCode
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from tests.levers.setups import peaks, setup_of, squared, transformer


class Tied(nn.Module):
    """Has one weight in two places, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4096, 64)
        self.head = nn.Linear(64, 4096, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(64))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids) * self.scale)


def tied() -> Workload:
    ids = torch.zeros(4, 8, dtype=torch.long)
    return Workload(model=Tied(), batch=batch_builder(ids), loss=squared)


def test_a_change_that_does_nothing_changes_nothing() -> None:
    for workload in (tied(), transformer()):
        setup = setup_of(workload)
        assert peaks(setup.changed(ModelCode("none", "model.eval().train()"))) == peaks(setup)


def test_a_weight_in_two_places_stays_one_in_another_format() -> None:
    cast = setup_of(tied()).changed(ModelCode("cast", "import torch\nmodel.to(torch.bfloat16)"))
    workload = tied()
    workload.model.to(torch.bfloat16)
    assert peaks(cast) == peaks(setup_of(workload))


def test_an_instance_of_an_optimizer_follows_its_parameters() -> None:
    workload = tied()
    given = replace(workload, optimizer=torch.optim.AdamW(workload.model.parameters()))
    change = ModelCode("cast", "import torch\nmodel.to(torch.bfloat16)")
    assert peaks(setup_of(given).changed(change)) == peaks(setup_of(workload).changed(change))
    assert workload.model.head.weight.dtype is torch.float32
