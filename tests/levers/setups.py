"""Small training runs to which levers are applied, and the same by hand."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import find_gpu
from autobatch.levers.known import LEVERS
from autobatch.levers.lever import Option
from autobatch.levers.setup import Setup
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload

SAMPLES = 4
WIDTH, LENGTH, DEPTH, CLASSES = 128, 32, 4, 10


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.fused_attn = True

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class ConvBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)))


class ConvNet(nn.Module):
    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(ConvBlock(channels) for _ in range(DEPTH)))
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def transformer() -> Workload:
    torch.manual_seed(0)
    sample = torch.randn(SAMPLES, LENGTH, WIDTH)
    return Workload(model=Transformer(), batch=batch_builder(sample), loss=squared)


def convnet() -> Workload:
    torch.manual_seed(0)
    sample = torch.randn(SAMPLES, 3, 16, 16)
    return Workload(model=ConvNet(), batch=batch_builder(sample), loss=squared)


def llama(**config: Any) -> Workload:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 1000,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **config}))
    ids = torch.randint(1000, (SAMPLES, LENGTH))
    batch = {"input_ids": ids, "labels": ids}
    return Workload(model=model, batch=batch_builder(batch))


def half_llama() -> Workload:
    workload = llama()
    workload.model.to(torch.bfloat16)
    return workload


RUNS: dict[str, Callable[[], Workload]] = {
    "transformer": transformer,
    "convnet": convnet,
    "llama": llama,
    "eager llama": lambda: llama(attn_implementation="eager"),
    "half llama": half_llama,
}


def setup_of(workload: Workload, gpu: str = "a100-40gb") -> Setup:
    return Setup(workload=workload, gpu=find_gpu(gpu))


def options_of(setup: Setup) -> dict[str, Option]:
    return {option.label: option for lever in LEVERS.values() for option in lever.options(setup)}


def labels_of(make: Callable[[], Workload]) -> list[str]:
    return list(options_of(setup_of(make())))


def peaks(setup: Setup, *, steps: int = 2) -> tuple[int, int]:
    """Return the bytes that two windows allocate and reserve at most."""
    device = VirtualGpu(setup.gpu, setup.settings)
    steps = steps if setup.workload.accumulates else 1
    run = device.run(setup.workload, micro_batch=SAMPLES, accumulation_steps=steps)
    return run.replay.peak_allocated_bytes, run.replay.peak_reserved_bytes


def executed(code: str, **names: Any) -> dict[str, Any]:
    """Run what an option shows as a user would, in a namespace with their objects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names.setdefault("torch", torch)
        exec(code, names)
    return names


def by_hand(option: Option, make: Callable[[], Workload]) -> Setup:
    """Return a run to which somebody applied an option's code."""
    setup = setup_of(make())
    workload = setup.workload
    lever, code = option.lever, option.code
    if lever == "allocator":
        executed(code)
        return setup_of(workload)
    if lever == "sharding":
        return setup.having(sharding=lambda model: executed(code, model=model) and None)
    if "autocast" in code and lever == "precision":
        return _in_autocast(setup, code)
    if option.label == "offload: optimizer state":  # torchao makes it on a card alone
        return setup.having(optimizer=lambda model: executed(code, model=model)["optimizer"])
    if option.value == "in backward":
        made = executed(code, model=workload.model)
        return (
            setup.having(
                window=_without_step(workload),
                loss=None,
                optimizer=torch.optim.SGD,
                accumulates=False,
            )
            if made
            else setup
        )
    made = executed(code, model=workload.model, batch=workload.batch(SAMPLES))
    optimizer = made.get("optimizer", workload.optimizer)
    return setup.having(
        model=made["model"], batch=batch_builder(made["batch"]), optimizer=optimizer
    )


def _in_autocast(setup: Setup, code: str) -> Setup:
    """Write the loop that the code asks for."""
    loss = setup.workload.loss
    first, *others = [line for line in code.splitlines() if "with " in line or "scaler" in line]
    if not others:
        body = f"def loss(model, batch):\n    {first}\n        return plain(model, batch)"
        return setup.having(loss=executed(body, torch=torch, plain=loss)["loss"])
    around, backward, *update = others
    body = (
        f"{first}\ndef window(model, optimizer, batches):\n    for batch in batches:\n"
        f"        {around}\n            loss = plain(model, batch)\n        loss = loss / 2\n"
        f"        {backward}\n{textwrap.indent(chr(10).join(update), '    ')}\n"
        "    optimizer.zero_grad()"
    )
    body = body.replace('GradScaler("cuda")', 'GradScaler("cuda", init_scale=1.0)')
    names = executed(body, torch=torch, plain=loss)
    return setup.having(window=names["window"], loss=None)


def _without_step(workload: Workload) -> Callable[..., None]:
    loss = workload.loss
    last: dict[str, Any] = {}  # as a loop that is no function keeps them

    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for batch in batches:
            if loss is None:
                last["output"] = model(**batch)
                last["loss"] = last["output"].loss / 1  # of one micro-batch
            else:
                last["loss"] = loss(model, batch)
            last["loss"].backward()

    return window


def with_instance(workload: Workload) -> Workload:
    """Return the run with an optimizer that was made before."""
    return replace(workload, optimizer=torch.optim.AdamW(workload.model.parameters(), lr=3e-4))
