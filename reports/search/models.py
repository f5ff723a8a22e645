"""Models of different kinds, each as a Workload, and the GPUs on which the search is checked.

The sizes are those of real training runs; the GPUs are chosen so that ceilings lie between a few
samples and a few hundred. Nothing is downloaded, and no weight is ever made: modules are built on
the `meta` device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from autobatch.workload.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A workload to check, and where.

    Attributes:
        what: the kind of model, and what is special about its training.
        build: makes the workload, its model on `meta`.
        gpus: catalogue names or sizes such as "24GiB".
    """

    name: str
    what: str
    build: Callable[[], Workload]
    gpus: tuple[str, ...]


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)


def tokens(*shape: int, below: int = 1000) -> Tensor:
    return torch.randint(below, shape)


def classify(model: nn.Module, batch: Any) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def images_and_labels(n: int, size: int = 224, classes: int = 1000) -> tuple[Tensor, Tensor]:
    return torch.zeros(n, 3, size, size), tokens(n, below=classes)


def library(package: str, name: str, **options: Any) -> nn.Module:
    """Build a model of timm or torchvision with random weights."""
    if package == "timm":
        create = partial(importlib.import_module("timm").create_model, pretrained=False)
    else:
        create = partial(importlib.import_module("torchvision").models.get_model, weights=None)
    with torch.device("meta"):
        model: nn.Module = create(name, **options)
    return model


def image_classifier(package: str, name: str, **options: Any) -> Workload:
    return Workload(model=library(package, name), batch=images_and_labels, loss=classify, **options)


def transformer(kind: str, head: str, **config: Any) -> nn.Module:
    """Build a model of transformers from a config."""
    transformers = importlib.import_module("transformers")
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, head)(getattr(transformers, kind)(**config))
    return model


def output_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def gpt2() -> Workload:
    def batch(n: int) -> dict[str, Tensor]:
        words = tokens(n, 1024, below=50257)
        return {"input_ids": words, "labels": words}

    model = transformer("GPT2Config", "GPT2LMHeadModel")
    return Workload(model=model, batch=batch, loss=output_loss, clip_norm=1.0)


def bert() -> Workload:
    def batch(n: int) -> dict[str, Tensor]:
        words = tokens(n, 512, below=30522)
        mask = torch.ones(n, 512, dtype=torch.int64)
        return {"input_ids": words, "attention_mask": mask, "labels": words}

    model = transformer("BertConfig", "BertForMaskedLM")
    return Workload(model=model, batch=batch, loss=output_loss, autocast="fp16")


def t5() -> Workload:
    def batch(n: int) -> dict[str, Tensor]:
        return {
            "input_ids": tokens(n, 512),
            "attention_mask": torch.ones(n, 512, dtype=torch.int64),
            "labels": tokens(n, 114),
        }

    model = transformer("T5Config", "T5ForConditionalGeneration", decoder_start_token_id=0)
    return Workload(model=model, batch=batch, loss=output_loss, optimizer=torch.optim.Adagrad)


class LstmLanguageModel(nn.Module):
    """Three LSTM layers between tied word embeddings, as of 2017."""

    def __init__(self, words: int = 33_278, width: int = 650):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.rnn = nn.LSTM(width, width, num_layers=3, dropout=0.4, batch_first=True)
        self.out = nn.Linear(width, words)
        self.out.weight = self.embed.weight

    def forward(self, inputs: Tensor) -> Tensor:
        states, _ = self.rnn(self.embed(inputs))
        logits: Tensor = self.out(states)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())


def lstm() -> Workload:
    with torch.device("meta"):
        model = LstmLanguageModel()
    return Workload(
        model=model,
        batch=lambda n: tokens(n, 140, below=33_278),
        optimizer=momentum,
        clip_norm=0.25,
    )


class GruTagger(nn.Module):
    """A bidirectional GRU over packed sentences."""

    def __init__(self, words: int = 20_000, width: int = 512, tags: int = 50):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.rnn = nn.GRU(width, width, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(2 * width, tags)

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(inputs), lengths, batch_first=True)
        states, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        logits: Tensor = self.out(states)
        return logits


def gru() -> Workload:
    def batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
        return tokens(n, 200), torch.full((n,), 200), tokens(n, 200, below=50)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, lengths, tags = batch
        logits = model(inputs, lengths.cpu())
        return F.cross_entropy(logits.flatten(0, 1), tags.flatten())

    with torch.device("meta"):
        model = GruTagger()
    return Workload(model=model, batch=batch, loss=loss)


def double_convolution(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [
            nn.Conv2d(width, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Four levels down and up again, joined by skip connections."""

    def __init__(self, classes: int = 21, width: int = 64):
        super().__init__()
        widths = [width * 2**level for level in range(5)]
        self.stem = double_convolution(3, width)
        self.down = nn.ModuleList(double_convolution(a, b) for a, b in pairwise(widths))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1])
        )
        self.join = nn.ModuleList(double_convolution(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.stem(x)]
        for block in self.down:
            levels.append(block(F.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([levels.pop(), up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


def unet() -> Workload:
    def batch(n: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(n, 3, 256, 256), tokens(n, 256, 256, below=21)

    with torch.device("meta"):
        model = UNet()
    return Workload(model=model, batch=batch, loss=classify, autocast="fp16")


class Clip(nn.Module):
    """Two towers whose similarities form an n x n matrix: memory is quadratic in n."""

    def __init__(self, width: int = 384, depth: int = 6, words: int = 49_408):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, nhead=6, dim_feedforward=4 * width, batch_first=True, norm_first=True
        )
        self.patches = nn.Conv2d(3, width, 16, stride=16)
        self.words = nn.Embedding(words, width)
        self.image_tower = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.text_tower = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        seen = self.image_tower(self.patches(images).flatten(2).transpose(1, 2)).mean(1)
        read = self.text_tower(self.words(words)).mean(1)
        logits = self.scale.exp() * F.normalize(seen, dim=-1) @ F.normalize(read, dim=-1).T
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def clip() -> Workload:
    with torch.device("meta"):
        model = Clip()
    return Workload(
        model=model,
        batch=lambda n: (torch.zeros(n, 3, 224, 224), tokens(n, 77)),
        autocast="bf16",
    )


def mlp() -> Workload:
    widths = [100_000, 4096, 4096, 4096, 100_000]
    with torch.device("meta"):
        layers = [
            layer
            for a, b in pairwise(widths)
            for layer in (nn.Linear(a, b), nn.LayerNorm(b), nn.GELU(), nn.Dropout(0.2))
        ]
        model = nn.Sequential(*layers)
    return Workload(
        model=model,
        batch=lambda n: torch.zeros(n, 100_000),
        loss=lambda model, x: F.mse_loss(model(x), x),
        optimizer=torch.optim.RMSprop,
    )


class SpeechRecogniser(nn.Module):
    """Strided convolutions over a spectrogram, then a transformer with a CTC loss."""

    def __init__(self, bands: int = 80, width: int = 512, characters: int = 64):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv1d(bands, width, 5, stride=2, padding=2),
            nn.BatchNorm1d(width),
            nn.GELU(),
            nn.Conv1d(width, 2 * width, 5, stride=2, padding=2),
            nn.GLU(dim=1),
        )
        layer = nn.TransformerEncoderLayer(width, 8, 2048, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 8)
        self.out = nn.Linear(width, characters)

    def forward(self, sound: Tensor) -> Tensor:
        states = self.encoder(self.convolutions(sound).transpose(1, 2))
        return F.log_softmax(self.out(states), dim=-1).transpose(0, 1)


def speech() -> Workload:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        sound, characters = batch
        scores = model(sound)
        steps, n, _ = scores.shape
        heard, said = torch.full((n,), steps), torch.full((n,), characters.shape[1])
        return F.ctc_loss(scores, characters, heard, said)

    with torch.device("meta"):
        model = SpeechRecogniser()
    return Workload(
        model=model,
        batch=lambda n: (torch.zeros(n, 80, 1200), tokens(n, 90, below=63) + 1),
        loss=loss,
        clip_norm=5.0,
    )


class CheckpointedDecoder(nn.Module):
    """A decoder of 24 layers that recomputes each one in the backward pass."""

    def __init__(self, words: int = 32_000, width: int = 1024, depth: int = 24):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 16, 4 * width, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.out = nn.Linear(width, words, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        length = inputs.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=inputs.device)
        x = self.embed(inputs)
        for layer in self.layers:
            x = checkpoint(layer, x, causal, is_causal=True, use_reentrant=False)
        logits = self.out(x)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())


def checkpointed() -> Workload:
    with torch.device("meta"):
        model = CheckpointedDecoder()
    return Workload(model=model, batch=lambda n: tokens(n, 1024), autocast="bf16", clip_norm=1.0)


def frozen() -> Workload:
    model = library("torchvision", "resnet50")
    model.requires_grad_(False)
    with torch.device("meta"):
        model.fc = nn.Linear(2048, 10)
    return Workload(model=model, batch=partial(images_and_labels, classes=10), loss=classify)


class Detector(nn.Module):
    """Class scores for a grid of boxes, of which a mask chooses those that count."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            double_convolution(3, 64), nn.MaxPool2d(4), double_convolution(64, 256)
        )
        self.scores = nn.Conv2d(256, 80, 1)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.scores(self.backbone(images)).permute(0, 2, 3, 1)
        return scores


def detector() -> Workload:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        images, classes = batch
        scores = model(images)
        chosen = classes >= 0
        return F.cross_entropy(scores[chosen], classes[chosen])

    with torch.device("meta"):
        model = Detector()
    return Workload(
        model=model,
        batch=lambda n: (torch.zeros(n, 3, 320, 320), tokens(n, 80, 80, below=80)),
        loss=loss,
    )


def vit_in_bf16() -> Workload:
    workload = image_classifier("timm", "vit_base_patch16_224")
    return replace(workload, autocast="bf16", clip_norm=1.0)


CASES = (
    Case(
        name="resnet50",
        what="convolutions, SGD with momentum",
        build=partial(image_classifier, "torchvision", "resnet50", optimizer=momentum),
        gpus=("t4", "a100-40gb"),
    ),
    Case(
        name="efficientnet_b0",
        what="depthwise convolutions",
        build=partial(image_classifier, "timm", "efficientnet_b0"),
        gpus=("rtx-3060", "a100-80gb"),
    ),
    Case(
        name="vit_base",
        what="vision transformer, bf16 autocast",
        build=vit_in_bf16,
        gpus=("l4", "a100-40gb"),
    ),
    Case(
        name="swin_tiny",
        what="windowed attention",
        build=partial(image_classifier, "timm", "swin_tiny_patch4_window7_224"),
        gpus=("v100-16gb", "l40s"),
    ),
    Case(name="gpt2", what="decoder, 1,024 tokens", build=gpt2, gpus=("rtx-3060", "b200")),
    Case(
        name="bert_base",
        what="encoder, padding mask, fp16 autocast with a GradScaler",
        build=bert,
        gpus=("v100-32gb", "h200"),
    ),
    Case(
        name="t5_small",
        what="encoder and decoder, relative positions, Adagrad",
        build=t5,
        gpus=("t4", "a100-40gb"),
    ),
    Case(
        name="lstm",
        what="cuDNN LSTM, tied embeddings, SGD with momentum",
        build=lstm,
        gpus=("8GiB", "rtx-4090"),
    ),
    Case(name="gru", what="bidirectional GRU, packed", build=gru, gpus=("2GiB", "6GiB")),
    Case(name="unet", what="U-Net, fp16 autocast", build=unet, gpus=("rtx-3090", "h100-80gb")),
    Case(
        name="clip",
        what="contrastive: n x n logits, bf16 autocast",
        build=clip,
        gpus=("rtx-4060", "rtx-3090"),
    ),
    Case(name="mlp", what="wide autoencoder, RMSprop", build=mlp, gpus=("15.5GiB", "v100-16gb")),
    Case(
        name="speech",
        what="convolutions, transformer, CTC loss",
        build=speech,
        gpus=("v100-16gb", "rtx-4090"),
    ),
    Case(
        name="checkpointed",
        what="24 layers recomputed in backward, bf16 autocast",
        build=checkpointed,
        gpus=("16GiB", "a100-80gb"),
    ),
    Case(
        name="frozen",
        what="ResNet-50 with a frozen backbone",
        build=frozen,
        gpus=("4GiB", "8GiB"),
    ),
    Case(
        name="detector",
        what="boolean masks: shapes take their upper bound",
        build=detector,
        gpus=("t4", "rtx-5090"),
    ),
)
