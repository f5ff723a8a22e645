"""What the rows trained, as workloads: models on `meta`, nothing downloaded."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autobatch.workload.workload import Workload
from reports.common import llama
from reports.common.zoo import build
from reports.throughput import mpt
from reports.throughput.rows import Row

__all__ = ["settings_of", "workload_of"]

_LLAMAS = {
    "llama3-8b": (4096, 32, 8, 14336, 32, 128256),
    "llama3-70b": (8192, 64, 8, 28672, 80, 128256),
    "llama2-13b": (5120, 40, 40, 13824, 40, 32000),
    "llama2-70b": (8192, 64, 8, 28672, 80, 32000),
}
_SHAPES = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
)


def workload_of(row: Row) -> Workload:
    """Build the workload of a row."""
    if row.model.startswith("mpt"):
        return _mpt(row)
    return _llama(row) if row.model.startswith("llama") else _image_model(row)


@contextlib.contextmanager
def settings_of(row: Row) -> Iterator[None]:
    """Set what was so for a row: TF32 where it says so, and no attention of cuDNN in those days."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    before = cuda.matmul.allow_tf32, cudnn.allow_tf32, cuda.cudnn_sdp_enabled()
    cuda.matmul.allow_tf32 = cudnn.allow_tf32 = row.precision != "fp32"
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.matmul.allow_tf32, cudnn.allow_tf32 = before[:2]
        cuda.enable_cudnn_sdp(before[2])


def _image_model(row: Row) -> Workload:
    """Return an image model of timm, with SGD; attention of 2022 was not one kernel."""
    layers = importlib.import_module("timm.layers")
    was_fused = layers.use_fused_attn()
    layers.set_fused_attn(False)
    try:
        model = build(row.model)
    finally:
        layers.set_fused_attn(was_fused)
    layout = torch.channels_last if row.layout == "nhwc" else torch.contiguous_format
    model.to(memory_format=layout)  # type: ignore[call-overload]

    def batch(n: int) -> Any:
        images = torch.zeros(n, 3, row.size, row.size).to(memory_format=layout)
        return images, torch.zeros(n, dtype=torch.int64)

    return Workload(
        model=model,
        batch=batch,
        loss=_cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        autocast="fp16" if row.precision == "fp16 autocast" else None,
        world_size=row.world_size,
    )


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def _llama(row: Row) -> Workload:
    shapes = dict(zip(_SHAPES, _LLAMAS[row.model], strict=True))
    every = re.fullmatch(r"every (\d)nd layer", row.checkpointing)
    policy = "full" if every else row.checkpointing
    with torch.device("meta"):
        model = llama.Llama(shapes, row.size, policy, int(every[1]) if every else 1)
    return _language_model(row, model, llama.sharded)


def _mpt(row: Row) -> Workload:
    with torch.device("meta"):
        model = mpt.Mpt(row.model, row.size, row.checkpointing == "full")
    return _language_model(row, model, partial(mpt.sharded, pure=row.precision == "bf16 pure"))


def _language_model(row: Row, model: nn.Module, sharding: Callable[[Any], None]) -> Workload:
    def batch(n: int) -> Any:
        return tuple(torch.zeros(n, row.size, dtype=torch.int64) for _ in range(2))

    return Workload(
        model=model,
        batch=batch,
        loss=_next_token,
        optimizer=partial(torch.optim.AdamW, lr=1e-4),
        clip_norm=1.0,
        world_size=row.world_size,
        sharding=sharding,
    )


def _next_token(model: nn.Module, batch: Any) -> Tensor:
    tokens, targets = batch
    return llama.loss_of(model(tokens), targets)
