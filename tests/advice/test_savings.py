"""What may go of a peak: each kind is named where a model has it, and nowhere else."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autobatch
from autobatch.advice.savings import savings_of
from autobatch.gpus.catalogue import find_gpu
from autobatch.levers.setup import Setup
from autobatch.workload.complete import Asked


class Model(nn.Module):
    """Attention over a sequence, with what may go in it or not."""

    def __init__(self, *, scores=False, mask=False, upcast=False):
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.middle = nn.Sequential(nn.Linear(32, 32), nn.Sigmoid())
        self.last = nn.Linear(32, 5000 if scores else 8)
        self.has_mask, self.casts = mask, upcast

    def forward(self, x):
        x = self.middle(self.first(x).relu())
        mask = None
        if self.has_mask:
            length = x.shape[1]
            allowed = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            mask = allowed.expand(x.shape[0], 1, length, length).clone()
        heads = x.unsqueeze(1)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).squeeze(1)
        if self.casts:
            mixed = mixed.float().pow(2).to(mixed.dtype)
        return self.last(mixed)


def plan_of(model, **options):
    def loss(net, x):
        output = net(x)
        if output.shape[-1] > 8:
            labels = torch.zeros(output.shape[:-1].numel(), dtype=torch.long, device=output.device)
            return F.cross_entropy(output.flatten(0, 1), labels)
        return output.pow(2).mean()

    given = {"target": 64, "sample": torch.zeros(2, 64, 32), "gpu": "24GiB"}
    return autobatch.tune(model, loss=loss, **given | options)


def kinds(plan):
    return {saving.kind for saving in savings_of(plan)}


def frozen():
    model = Model()
    model.middle.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("kind", "make", "options"),
    [
        ("scores", lambda: Model(scores=True), {}),
        ("mask", lambda: Model(mask=True), {}),
        ("upcast", lambda: Model(upcast=True), {"autocast": "bf16"}),
        ("frozen", frozen, {}),
    ],
)
def test_what_may_go_is_named_with_its_bytes(kind, make, options):
    plan = plan_of(make(), **options)

    (saving,) = (each for each in savings_of(plan) if each.kind == kind)

    assert 0 < saving.size_bytes < plan.footprint.peak_allocated_bytes
    assert " may " in saving.text
    assert "at the peak" in saving.text
    names = {name for name, _ in make().named_modules()}
    assert set(saving.modules) <= names


def test_nothing_is_named_where_a_model_has_none_of_it():
    assert kinds(plan_of(Model())) == set()


def test_copies_in_float32_are_named_only_where_the_run_is_in_half_precision():
    assert "upcast" not in kinds(plan_of(Model(upcast=True)))


def test_a_frozen_module_has_its_path_in_the_plan():
    assert plan_of(frozen()).model.frozen == ("middle",)


def test_example_plan_of_an_earlier_version_has_nothing_to_name():
    from tests.support.plans import example_plan

    assert savings_of(example_plan()) == ()


def test_what_a_change_of_the_copy_freezes_counts_as_frozen():
    def freeze(model):
        model.middle.requires_grad_(False)

    asked = Asked(model=Model(), sample=torch.zeros(2, 64, 32)).workload()
    plan = plan_of(replace(asked, changes=(freeze,)), sample=None)

    assert plan.model.frozen == ("middle",)
    assert plan.model.parameters - plan.model.trainable_parameters == 32 * 32 + 32
    assert "frozen" in kinds(plan)


def test_adapters_are_what_learns_in_a_plan_with_lora():
    pytest.importorskip("peft")
    from autobatch.levers.lora import lora

    asked = Asked(model=Model(), sample=torch.zeros(2, 64, 32)).workload()
    setup = Setup(workload=asked, gpu=find_gpu("t4"))
    (option,) = lora(ranks=[2], modules=["first"]).options(setup)
    plan = plan_of(option.apply(setup).workload, sample=None)

    assert plan.model.trainable_parameters == 2 * (32 + 32)
    assert plan.model.frozen == ("first", "middle", "last")
