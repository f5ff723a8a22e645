"""What may go of a peak: each kind is named where a model has it, and nowhere else."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
        self.middle = nn.Sequential(nn.Linear(32, 32), nn.Sigmoid(), nn.Linear(32, 32))
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
    assert plan.model.parameters - plan.model.trainable_parameters == 2 * (32 * 32 + 32)
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


def tuned(model, sample, loss, **options):
    return autobatch.tune(model, sample=sample, loss=loss, target=64, gpu="24GiB", **options)


class Segmenter(nn.Module):
    """Features of as many channels as there are classes, and scores of the size of the images."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Sigmoid())
        self.head = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.head(self.features(x))


def test_classes_of_images_are_those_behind_the_batch_and_features_are_no_scores():
    def loss(net, batch):
        return F.cross_entropy(net(batch[0]), batch[1])

    sample = (torch.zeros(2, 3, 40, 48), torch.zeros(2, 40, 48, dtype=torch.long))
    plan = tuned(Segmenter(), sample, loss)

    (saving,) = savings_of(plan)
    alike = [each for each in plan.peak_blocks if each.holder.shape == (64, 16, 40, 48)]
    assert any(each.holder.op == "sigmoid" for each in alike)
    assert saving.text.startswith("scores of 16 classes are held 3 times at the peak")
    assert saving.size_bytes == 2 * 64 * 16 * 40 * 48 * 4


class Similarities(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        return (scores * torch.logical_and(scores > 0, scores < 3)).sum((1, 2))


class Leaky(nn.Module):
    """Works on square images of one channel, as a denoiser does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        x = x + self.conv(x)
        x = torch.where(x > 0, x, x * 0.1)
        return self.conv(x) * torch.logical_and(x > 0, x < 1)


@pytest.mark.parametrize(
    ("model", "shape"), [(Similarities(), (2, 96, 32)), (Leaky(), (2, 1, 96, 96))]
)
def test_square_tensors_are_no_masks_where_there_is_no_attention(model, shape):
    plan = tuned(model, torch.zeros(shape), lambda net, x: net(x).mean())

    ops = {each.holder.op for each in plan.peak_blocks if each.holder.shape[-2:] == (96, 96)}
    assert ops & {"logical_and", "where"}
    assert savings_of(plan) == ()


class OneHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x):
        heads = self.inner(x).unsqueeze(1)
        scores = (heads @ heads.transpose(-1, -2)).mul(0.1).sin()
        return scores.softmax(-1) @ heads


def test_scaled_scores_of_a_single_head_are_no_mask():
    plan = tuned(OneHead(), torch.zeros(2, 96, 32), lambda net, x: net(x).mean())

    square = {each.holder.op for each in plan.peak_blocks if each.holder.shape[-2:] == (96, 96)}
    assert {"mul", "_softmax"} <= square
    assert "mask" not in kinds(plan)


class Tagger(nn.Module):
    """Layers of which the first ones may not learn."""

    def __init__(self, *, checkpoints=False):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.first = nn.Linear(64, 64)
        self.frozen = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.last = nn.GRU(64, 64, batch_first=True)
        self.checkpoints = checkpoints

    def forward(self, x):
        x = self.first(self.embed(x))
        x = checkpoint(self.frozen, x, use_reentrant=False) if self.checkpoints else self.frozen(x)
        return self.last(x)[0]


def kinds_of_tagger(*frozen, **options):
    model = Tagger(**options)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    return kinds(tuned(model, tokens, lambda net, x: net(x).pow(2).mean()))


def test_a_frozen_module_is_named_only_for_what_a_checkpoint_would_free():
    assert kinds_of_tagger("frozen") == {"frozen"}
    assert kinds_of_tagger("embed") == set()  # the next layer keeps what it returns
    assert kinds_of_tagger("embed", "first", "frozen") == set()  # autograd keeps nothing of theirs
    assert kinds_of_tagger("frozen", checkpoints=True) == set()


def test_no_byte_is_named_twice_and_a_loss_is_told_of_no_fused_activation():
    def loss(net, x):
        return F.cross_entropy(net(x).flatten(0, 1), torch.zeros_like(x).flatten())

    model = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 2000, bias=False))
    model[1].requires_grad_(False)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    plan = tuned(model, tokens, loss, autocast="bf16")

    casts = [each for each in plan.peak_blocks if each.holder.op == "_to_copy"]
    assert any(each.holder.shape == (64 * 64, 2000) for each in casts)
    (saving,) = savings_of(plan)
    assert saving.kind == "scores"
    assert saving.size_bytes < plan.footprint.peak_allocated_bytes

    squares = tuned(
        nn.Linear(64, 512),
        torch.zeros(2, 64, 64),
        lambda net, x: net(x).pow(2).mean(),
        autocast="bf16",
    )
    (saving,) = savings_of(squares)
    assert saving.kind == "upcast"
    assert "gelu" not in saving.text and "fused" not in saving.brief
