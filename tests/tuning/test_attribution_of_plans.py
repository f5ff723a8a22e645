"""Blocks at the peak of plans: they sum to the footprint, and bear names of the model's modules."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import autobatch


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Linear(8 * 16 * 16, 10)

    def forward(self, images):
        return self.head(self.features(images).flatten(1))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.up = nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, images):
        return self.up(self.middle(F.relu(self.down(images)))) + images


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 16)
        self.lstm = nn.LSTM(16, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(64, 5)

    def forward(self, tokens):
        return self.out(self.lstm(self.embedding(tokens))[0]).mean(1)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(64, 4)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.out = nn.Linear(64, 5)

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        mixed = torch.stack([expert(x) for expert in self.experts], -1)
        return self.out((mixed * weights.unsqueeze(1)).sum(-1))


class Blocks(nn.Module):
    """Blocks of a wide and a narrow layer, with checkpoints or without."""

    def __init__(self, checkpoints=None):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(4)
        )
        self.out = nn.Linear(32, 5)
        self.checkpoints = checkpoints

    def forward(self, x):
        for block in self.blocks:
            if self.checkpoints is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.checkpoints == "reentrant")
        return self.out(x)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(3, 4, 3, stride=4)
        self.text = nn.EmbeddingBag(50, 4 * 8 * 8)
        self.out = nn.Linear(4 * 8 * 8, 5)

    def forward(self, image, text):
        return self.out(self.image(image).flatten(1) * self.text(text))


def images(batch=2):
    return torch.zeros(batch, 3, 32, 32)


def classes(batch=2, number=5):
    return torch.zeros(batch, dtype=torch.long)


def tokens():
    return torch.zeros(2, 12, dtype=torch.long)


def of_transformers(name):
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 200}
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16, **common)
        model = transformers.GPT2LMHeadModel(config)
    elif name == "bert":
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
        config = transformers.BertConfig(intermediate_size=64, **sizes, **common)
        model = transformers.BertForMaskedLM(config)
    elif name == "vit":
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
        config = transformers.ViTConfig(intermediate_size=64, image_size=32, patch_size=8, **sizes)
        model = transformers.ViTForImageClassification(config)
        return model, {"pixel_values": images(), "labels": classes()}
    else:
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        config = transformers.T5Config(decoder_start_token_id=0, **sizes, **common)
        model = transformers.T5ForConditionalGeneration(config)
    return model, {"input_ids": tokens(), "labels": tokens()}


def squared(model, batch):
    return model(batch).pow(2).mean()


def kinds():
    yield "convolutions", lambda: (ConvNet(), (images(), classes()), {})
    yield "U-Net", lambda: (UNet(), images(), {"loss": squared})
    yield "recurrent", lambda: (Tagger(), (tokens(), classes()), {})
    yield "experts", lambda: (Experts(), (torch.zeros(2, 64), classes()), {})
    yield "plain blocks", lambda: (Blocks(), (torch.zeros(2, 32), classes()), {})
    for way in ("reentrant", "other"):
        yield (
            f"checkpoints, {way}",
            lambda way=way: (
                Blocks(way),
                (torch.zeros(2, 32, requires_grad=True), classes()),
                {},
            ),
        )
    yield (
        "FSDP2",
        lambda: (
            Blocks(),
            (torch.zeros(2, 32), classes()),
            {"world_size": 2, "sharding": "fsdp"},
        ),
    )
    yield (
        "several inputs",
        lambda: (
            TwoInputs(),
            {"image": images(), "text": tokens()},
            {"loss": lambda model, batch: model(**batch).pow(2).mean()},
        ),
    )
    for name in ("gpt2", "bert", "vit", "t5"):
        yield name, lambda name=name: (*of_transformers(name), {})
    yield "autocast", lambda: (Blocks(), (torch.zeros(2, 32), classes()), {"autocast": "bf16"})


def total(blocks, by):
    sums = Counter()
    for each in blocks:
        sums[by(each.holder)] += each.size_bytes
    return sums


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "make"), [pytest.param(k, m, id=k) for k, m in kinds()])
@pytest.mark.parametrize("target", [8, 1_000_001], ids=["simulated", "predicted"])
def test_blocks_at_the_peak_sum_to_it_and_bear_names_of_the_model(kind, make, target):
    model, sample, options = make()

    plan = autobatch.tune(model, target=target, sample=sample, gpu="2GiB", **options)

    expected = {
        name: size
        for name, size in plan.footprint.categories.items()
        if size and name != "rounding"
    }
    blocks = plan.peak_blocks
    # a size that divides the target well may be one that was executed
    was_run = plan.micro_batch in {trial.micro_batch for trial in plan.trials}
    assert plan.footprint.evidence == ("simulated" if was_run else "predicted")
    allocated = plan.footprint.peak_allocated_bytes - plan.footprint.rounding_bytes
    assert total(blocks, lambda holder: holder.category) == expected
    for by in ("module", "op"):
        assert sum(total(blocks, lambda holder, by=by: getattr(holder, by)).values()) == allocated
    names = {name for name, _ in model.named_modules()}
    assert {holder.module for holder in plan.lives.holders} <= names
    owned = {each.holder.module for each in blocks if each.holder.category == "parameters"}
    for name, _ in model.named_parameters():
        assert name.rpartition(".")[0] in owned
    made = [h for h in plan.lives.holders if h.phase in ("forward", "backward") and h.module]
    assert {h.phase for h in made} == {"forward", "backward"}
    assert [b.size_bytes for b in blocks] == sorted((b.size_bytes for b in blocks), reverse=True)


def test_lives_sum_to_the_timeline_at_every_sample():
    plan = autobatch.tune(ConvNet(), target=64, sample=(images(), classes()), gpu="24GiB")

    lives = plan.lives
    assert lives.least_bytes == 0
    for sample in plan.timeline.samples:
        alive = Counter()
        for holder, start, end, size in zip(
            lives.holder, lives.start, lives.end, lives.size_bytes, strict=True
        ):
            if start <= sample.event < end:
                alive[lives.holders[holder].category] += size
        assert alive == {name: size for name, size in sample.categories.items() if size}


def test_most_in_the_window_is_at_least_what_is_at_the_peak():
    model = ConvNet()
    plan = autobatch.tune(model, target=64, sample=(images(), classes()), gpu="24GiB")

    for name, size in plan.footprint.categories.items():
        if name != "rounding":
            assert plan.most_bytes.get(name, 0) >= size
    weights = sum(p.nbytes for p in model.parameters())
    assert plan.most_bytes["gradients"] == weights > plan.footprint.gradients_bytes
