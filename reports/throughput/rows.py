"""The published rows: what ran, on what, and how fast.

Each table is divided into two halves, row by row in turn: constants are fitted to the first, and
the second is left to judge them by.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from autobatch.gpus.catalogue import CATALOGUE, GpuSpec

__all__ = ["SOURCES", "Half", "Row", "read_rows"]

ROWS = Path(__file__).with_name("rows.csv")

Half = Literal["fitted", "held out"]

SOURCES = {
    "timm nhwc": (
        "huggingface/pytorch-image-models, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv"
    ),
    "timm nchw": (
        "huggingface/pytorch-image-models, results/benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv"
    ),
    "nvidia": (
        "NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets: resnet50v1.5/README.md "
        "(container 21.03) and resnext101-32x4d/README.md"
    ),
    "v100 resnet-50": "sandeepkumar-skb/pytorch_experiments, torchvision_exp/README.md",
    "torchtitan": (
        "pytorch/torchtitan, docs/performance.md (2024-07, A100) and "
        "benchmarks/llama3_h100_202412_torchtitan.md (H100)"
    ),
    "mosaicml h100": "mosaicml/llm-foundry, scripts/train/benchmarking/README.md",
    "mosaicml a100": "mosaicml/llm-foundry, scripts/train/benchmarking/README.md",
}
"""By table: where its figures are published."""

_OTHER_CARDS = {
    # torchtitan's page gives the bandwidth, and a limit of 500 W: its peak is between those of
    # the H100 NVL and the H100 SXM
    "h100-96gb-hbm2e": replace(
        CATALOGUE["h100-80gb"],
        name="h100-80gb with HBM2e",
        capacity_bytes=96 * 10**9,
        bandwidth_bytes_per_s=2_400_000_000_000,
        flops=CATALOGUE["h100-nvl"].flops,
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One published figure.

    Attributes:
        number: of the row in its table, from 0.
        table: a key of `SOURCES`.
        model: its name there.
        gpu: the card.
        world_size: how many of it.
        micro_batch: samples of one forward pass on one card.
        size: side of an image, or length of a sequence.
        accumulation: micro-batches of a window.
        precision: such as "fp16 autocast".
        layout: "nchw" or "nhwc" of images; else empty.
        sharding: "ddp", "fsdp" or empty.
        checkpointing: "none", "full", "op" or "every 2nd layer".
        published: the figure.
        unit: "images/s", "tokens/s" (of one card), or "ms/step".
    """

    number: int
    table: str
    model: str
    gpu: str
    world_size: int
    micro_batch: int
    size: int
    accumulation: int
    precision: str
    layout: str
    sharding: str
    checkpointing: str
    published: float
    unit: str

    @property
    def half(self) -> Half:
        """Whether constants are fitted to it."""
        return "held out" if self.number % 2 else "fitted"

    @property
    def card(self) -> GpuSpec:
        """The card."""
        return _OTHER_CARDS.get(self.gpu) or CATALOGUE[self.gpu]

    @property
    def key(self) -> str:
        """Its name among all rows."""
        return f"{self.table} {self.number}"

    @property
    def samples_per_second(self) -> float:
        """Samples a second of one card, as published."""
        if self.unit == "ms/step":
            return 1000 * self.micro_batch * self.accumulation / self.published
        return self.published / (self.size if self.unit == "tokens/s" else 1)


def read_rows() -> list[Row]:
    """Read `rows.csv`."""
    found: list[Row] = []
    numbers: dict[str, int] = {}
    with ROWS.open(encoding="utf-8", newline="") as file:
        for told in csv.DictReader(file):
            table = told["table"]
            number = numbers[table] = numbers.get(table, -1) + 1
            found.append(
                Row(
                    number=number,
                    table=table,
                    model=told["model"],
                    gpu=told["gpu"],
                    world_size=int(told["world_size"]),
                    micro_batch=int(told["micro_batch"]),
                    size=int(told["size"]),
                    accumulation=int(told["accumulation"]),
                    precision=told["precision"],
                    layout=told["layout"],
                    sharding=told["sharding"],
                    checkpointing=told["checkpointing"],
                    published=float(told["published"]),
                    unit=told["unit"],
                )
            )
    return found
