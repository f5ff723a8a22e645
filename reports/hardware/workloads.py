"""The workloads that are measured, in order of importance, each with the memory that it may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autobatch.support.units import GIB
from autobatch.workload.workload import Workload
from reports.hardware.language import T5, Bert, Gpt2, Llama, LstmLanguageModel, TwoTowers
from reports.hardware.vision import ConvNext, ResNet, Swin, UNet, VisionTransformer


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A workload to measure.

    Attributes:
        what: the model, its precision, its optimizer and its input.
        make: builds it; `make(**small)` builds one of the same kind that a CPU runs in a second.
        parameters: what the model must have.
        limit_bytes: what the process may use of the card; None for all of it.
        compares: also let the batch-size finders of other libraries search.
        times_recording: also time windows with and without PyTorch's memory history.
    """

    name: str
    what: str
    make: Callable[..., Workload]
    parameters: int
    limit_bytes: int | None
    small: Mapping[str, Any] = field(default_factory=dict)
    compares: bool = False
    times_recording: bool = False


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)


def tokens(*shape: int, below: int) -> Tensor:
    return torch.randint(1, below, shape)


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(*batch)
    return loss


def classify(model: nn.Module, batch: Any) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def images(n: int, size: int) -> Tensor:
    """Make n times the same noise: what is in an image takes no memory."""
    return torch.rand(1, 3, size, size).repeat(n, 1, 1, 1)


def image_classifier(
    kind: Callable[..., nn.Module],
    *,
    image: int = 224,
    channels_last: bool = False,
    optimizer: Any = adamw,
    autocast: str | None = None,
    **sizes: Any,
) -> Workload:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def batch(n: int) -> tuple[Tensor, Tensor]:
        return images(n, image).to(memory_format=layout), tokens(n, below=1000)

    return Workload(
        model=kind(**sizes).to(memory_format=layout),
        batch=batch,
        loss=classify,
        optimizer=optimizer,
        autocast=autocast,
    )


def gpt2(*, words: int = 50257, length: int = 1024, autocast: str | None, **sizes: Any) -> Workload:
    return Workload(
        model=Gpt2(words, length, **sizes),
        batch=lambda n: (tokens(n, length, below=words),),
        loss=model_loss,
        optimizer=adamw,
        autocast=autocast,
        clip_norm=1.0,
    )


def bert(*, words: int = 30522, length: int = 512, **sizes: Any) -> Workload:
    def batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
        lengths = length - torch.arange(n) % (length // 2)
        is_word = torch.arange(length)[None, :] < lengths[:, None]
        text = tokens(n, length, below=words)
        return text * is_word, is_word, text

    return Workload(
        model=Bert(words, length, **sizes),
        batch=batch,
        loss=model_loss,
        optimizer=adamw,
        autocast="fp16",
    )


def t5(
    *, words: int = 32128, length: int = 512, answer_length: int = 128, **sizes: Any
) -> Workload:
    return Workload(
        model=T5(words, **sizes),
        batch=lambda n: (tokens(n, length, below=words), tokens(n, answer_length, below=words)),
        loss=model_loss,
        optimizer=adamw,
    )


def llama(*, words: int = 32000, length: int = 2048, meta: bool = True, **sizes: Any) -> Workload:
    with torch.device("meta" if meta else "cpu"):
        model = Llama(words, **sizes).to(torch.bfloat16)
    return Workload(
        model=model,
        batch=lambda n: (tokens(n, length, below=words),),
        loss=model_loss,
        optimizer=adamw,
        clip_norm=1.0,
    )


def lstm(*, words: int = 33278, length: int = 140, **sizes: Any) -> Workload:
    return Workload(
        model=LstmLanguageModel(words, **sizes),
        batch=lambda n: (tokens(n, length, below=words),),
        loss=model_loss,
        optimizer=momentum,
        clip_norm=0.25,
    )


def unet(*, size: int = 256, **sizes: Any) -> Workload:
    return Workload(
        model=UNet(**sizes),
        batch=lambda n: (images(n, size), tokens(n, size, size, below=21)),
        loss=classify,
        optimizer=adamw,
    )


def contrastive(*, size: int = 64, words: int = 8192, length: int = 32, **sizes: Any) -> Workload:
    return Workload(
        model=TwoTowers(words=words, size=size, **sizes),
        batch=lambda n: (images(n, size), tokens(n, length, below=words)),
        loss=model_loss,
        optimizer=adamw,
        autocast="bf16",
    )


def mlp(*, inputs: int = 2048, width: int = 4096, depth: int = 6) -> Workload:
    widths = [inputs, *[width] * depth]
    layers = [
        layer
        for a, b in pairwise(widths)
        for layer in (nn.Linear(a, b), nn.LayerNorm(b), nn.GELU(), nn.Dropout(0.1))
    ]
    return Workload(
        model=nn.Sequential(*layers, nn.Linear(width, 1000)),
        batch=lambda n: (torch.rand(1, inputs).repeat(n, 1), tokens(n, below=1000)),
        loss=classify,
        optimizer=adamw,
    )


_SMALL_TEXT = {"words": 97, "length": 32, "width": 64, "depth": 2, "heads": 2}
_SMALL_LLAMA = {**_SMALL_TEXT, "groups": 1, "inner": 96, "meta": False}
_SMALL_RESNET = {"image": 64, "depths": (1, 1, 1, 1), "width": 16}

CASES = (
    Case(
        name="resnet50-fp32",
        what="ResNet-50, fp32, SGD with momentum, 224 x 224",
        make=partial(image_classifier, ResNet, optimizer=momentum),
        parameters=25_557_032,
        limit_bytes=16 * GIB,
        small=_SMALL_RESNET,
        compares=True,
        times_recording=True,
    ),
    Case(
        name="gpt2-bf16",
        what="GPT-2 124M, bf16 autocast, AdamW, clipped, 1,024 tokens",
        make=partial(gpt2, autocast="bf16"),
        parameters=124_439_808,
        limit_bytes=16 * GIB,
        small=_SMALL_TEXT,
        compares=True,
        times_recording=True,
    ),
    Case(
        name="llama-1b-bf16",
        what="Llama-like 1.1B, bf16 weights, AdamW, clipped, 2,048 tokens",
        make=llama,
        parameters=1_100_048_384,
        limit_bytes=None,
        small=_SMALL_LLAMA,
    ),
    Case(
        name="resnet50-bf16-channels-last",
        what="ResNet-50, bf16 autocast, channels last, SGD with momentum, 224 x 224",
        make=partial(
            image_classifier, ResNet, optimizer=momentum, channels_last=True, autocast="bf16"
        ),
        parameters=25_557_032,
        limit_bytes=None,
        small=_SMALL_RESNET,
    ),
    Case(
        name="resnet50-deep-stem-fp32",
        what="ResNet-50, a stem of three 3 x 3 convolutions, fp32, SGD with momentum, 224 x 224",
        make=partial(image_classifier, ResNet, optimizer=momentum, deep_stem=True),
        parameters=25_576_264,
        limit_bytes=None,
        small=_SMALL_RESNET,
    ),
    Case(
        name="vit-b-bf16",
        what="ViT-B/16, bf16 autocast, AdamW, 224 x 224",
        make=partial(image_classifier, VisionTransformer, autocast="bf16"),
        parameters=86_567_656,
        limit_bytes=16 * GIB,
        small={"image": 64, "size": 64, "width": 64, "depth": 2, "heads": 2},
    ),
    Case(
        name="bert-fp16-padded",
        what="BERT-base, padding mask, fp16 autocast with a GradScaler, AdamW, 512 tokens",
        make=bert,
        parameters=109_514_298,
        limit_bytes=8 * GIB,
        small=_SMALL_TEXT,
        compares=True,
    ),
    Case(
        name="llama-1b-checkpointed",
        what="Llama-like 1.1B, bf16 weights, layers recomputed, AdamW, clipped, 2,048 tokens",
        make=partial(llama, checkpoints=True),
        parameters=1_100_048_384,
        limit_bytes=24 * GIB,
        small=_SMALL_LLAMA,
    ),
    Case(
        name="unet-fp32",
        what="U-Net, fp32, AdamW, 256 x 256",
        make=unet,
        parameters=31_038_933,
        limit_bytes=16 * GIB,
        small={"size": 32, "width": 8, "depth": 2},
        compares=True,
    ),
    Case(
        name="swin-t-fp32",
        what="Swin-T, fp32, AdamW, 224 x 224",
        make=partial(image_classifier, Swin),
        parameters=28_288_354,
        limit_bytes=16 * GIB,
        small={"image": 56, "size": 56, "depths": (2, 2), "width": 24, "heads": (2, 4)},
    ),
    Case(
        name="t5-small-fp32",
        what="T5-small, fp32, relative position bias, AdamW, 512 and 128 tokens",
        make=t5,
        parameters=60_506_624,
        limit_bytes=16 * GIB,
        small={**_SMALL_TEXT, "answer_length": 16, "inner": 96},
    ),
    Case(
        name="lstm-fp32",
        what="LSTM of three layers, fp32, SGD with momentum, clipped, 140 words",
        make=lstm,
        parameters=31_819_578,
        limit_bytes=8 * GIB,
        small={"words": 97, "length": 16, "width": 32},
    ),
    Case(
        name="mlp-fp32",
        what="MLP of six layers of 4,096, fp32, AdamW",
        make=mlp,
        parameters=96_445_416,
        limit_bytes=8 * GIB,
        small={"inputs": 64, "width": 64, "depth": 2},
    ),
    Case(
        name="contrastive-bf16",
        what="two towers, n x n similarities, bf16 autocast, AdamW",
        make=contrastive,
        parameters=6_901_505,
        limit_bytes=16 * GIB,
        small={"size": 32, "words": 97, "length": 16, "width": 64, "depth": 1},
    ),
    Case(
        name="convnext-t-bf16",
        what="ConvNeXt-T, bf16 autocast, AdamW, 224 x 224",
        make=partial(image_classifier, ConvNext, autocast="bf16"),
        parameters=28_589_128,
        limit_bytes=16 * GIB,
        small={"image": 64, "depths": (1, 1), "widths": (16, 32)},
    ),
    Case(
        name="gpt2-fp32",
        what="GPT-2 124M, fp32, AdamW, clipped, 1,024 tokens",
        make=partial(gpt2, autocast=None),
        parameters=124_439_808,
        limit_bytes=24 * GIB,
        small=_SMALL_TEXT,
    ),
)
"""What is measured, the most telling first: what time does not allow is left out at the end."""


def find_case(name: str) -> Case:
    """Return the case of that name.

    Raises:
        KeyError: there is none.
    """
    return {case.name: case for case in CASES}[name]
