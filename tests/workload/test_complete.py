"""What is asked wins over what a Workload says, and what neither says is inferred."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import autobatch
from autobatch.errors import SampleError, UsageError
from autobatch.workload.complete import Asked
from autobatch.workload.workload import Workload

MODEL = nn.Linear(3, 2)


def given(**options: object) -> Workload:
    return Workload(model=MODEL, batch=lambda n: torch.zeros(n, 3), **options)  # type: ignore[arg-type]


def test_a_workload_of_which_nothing_is_asked_stays_as_it_is() -> None:
    workload = given(clip_norm=2.0, world_size=4, loss_name="inferred", notes=("kept",))
    assert Asked(model=workload).workload() == workload


def test_options_that_are_asked_for_replace_those_of_a_workload() -> None:
    workload = given(clip_norm=2.0, optimizer=torch.optim.SGD, loss_name="inferred")
    asked = Asked(model=workload, clip_norm=1.0, loss=torch.vdot, world_size=2, sharding="fsdp")
    made = asked.workload()
    assert (made.clip_norm, made.loss, made.world_size) == (1.0, torch.vdot, 2)
    assert made.loss_name == "user" and made.shares == "fsdp"
    assert made.optimizer is torch.optim.SGD


def test_a_sample_replaces_the_batches_and_adds_its_notes() -> None:
    items = TensorDataset(torch.zeros(7, 3))
    made = Asked(model=given(notes=("kept",)), sample=items).workload()
    assert made.sample_limit == 7 and made.notes == ("kept",)
    assert made.batch(5)[0].shape == (5, 3)
    differing = [torch.zeros(length, 3) for length in (2, 9)]
    loader = torch.utils.data.DataLoader(differing)  # type: ignore[arg-type]
    first, second, *_ = Asked(model=given(notes=("kept",)), sample=loader).workload().notes
    assert first == "kept" and "dataset[1]" in second


def test_a_module_without_a_sample_gets_inferred_inputs() -> None:
    made = Asked(model=MODEL).workload()
    assert made.batch(4).shape == (4, 3) and made.loss_name == "inferred"


def test_a_function_that_makes_batches_belongs_into_a_workload() -> None:
    with pytest.raises(SampleError, match=r"autobatch\.Workload\(model=…, batch=…\)"):
        Asked(model=nn.Linear(3, 1), sample=lambda n: torch.zeros(n, 3)).workload()


def test_anything_but_a_module_or_a_workload_is_refused() -> None:
    with pytest.raises(UsageError, match=r"model is a str: pass an nn\.Module"):
        Asked(model="resnet50").workload()  # type: ignore[arg-type]


def test_batch_dims_reaches_the_batches_and_needs_a_sample():
    sample = {"src": torch.zeros(50, 4, 16)}
    made = Asked(model=nn.LSTM(16, 8), sample=sample, batch_dims={"src": 1}).workload()
    assert made.batch(6)["src"].shape == (50, 6, 16)
    with pytest.raises(UsageError, match="pass sample="):
        Asked(model=nn.Linear(3, 1), batch_dims=1).workload()


@pytest.mark.parametrize(
    ("function", "first"),
    [
        (autobatch.advise, {"model": nn.Linear(2, 2), "gpu": "t4"}),
        (autobatch.compare, {"model": nn.Linear(2, 2), "gpus": ["t4"]}),
        (autobatch.vary, {"build": lambda value: nn.Linear(value, 2), "values": [2]}),
        (autobatch.sweep, {"model": nn.Linear(2, 2), "gpu": "t4"}),
        (autobatch.tune, {"model": nn.Linear(2, 2), "gpu": "t4"}),
    ],
)
def test_an_unknown_argument_is_told_in_the_words_of_the_caller(function, first):
    with pytest.raises(
        TypeError, match=rf"^{function.__name__}\(\) got an unexpected .* 'autocats'"
    ):
        function(**first, target=8, autocats="bf16")
