"""Batches of any kind are moved to the device, and are there what they were."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.accounting import footprint_of
from autobatch.records.footprint import Footprint
from autobatch.workload.workload import Workload

WIDTH = 64


@dataclasses.dataclass(frozen=True)
class Record:
    x: Tensor
    y: Tensor


def footprint(make: Any) -> Footprint:
    """Account for training on batches of a class, which have to arrive on the device."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert type(batch) is type(make(x=torch.ones(1), y=torch.ones(1)))
        x, y = (batch["x"], batch["y"]) if hasattr(batch, "keys") else (batch.x, batch.y)
        assert x.is_cuda and y.is_cuda
        return (model(x).sum(1) - y).square().mean()

    workload = Workload(
        model=nn.Linear(WIDTH, WIDTH),
        batch=lambda n: make(x=torch.ones(n, WIDTH), y=torch.ones(n)),
        loss=loss,
    )
    device = VirtualGpu(find_gpu("t4"))
    with device.hosting(workload):
        run = device.run(workload, micro_batch=512, accumulation_steps=2)
    return footprint_of(run.trace, run.replay, device.spec, device.evidence, simulated=True)


@pytest.mark.parametrize("make", [Record, SimpleNamespace])
def test_the_tensors_of_dataclasses_and_of_plain_objects_reach_the_device(make: Any) -> None:
    assert footprint(make) == footprint(dict)


def test_an_encoding_of_transformers_reaches_the_device_as_what_it_is() -> None:
    transformers = pytest.importorskip("transformers")
    assert footprint(lambda **fields: transformers.BatchEncoding(fields)) == footprint(dict)
