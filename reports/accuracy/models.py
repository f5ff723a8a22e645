"""The training runs behind the tables, as workloads: models on `meta`, nothing downloaded."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autobatch.workload.infer.infer import infer
from autobatch.workload.workload import AUTOCAST_DTYPES, WindowFunction, Workload
from reports.accuracy.tables import Run
from reports.accuracy.transformers_configs import CONFIGS

OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=1e-3),
    "sgd-momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-3),
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-3),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-3),
}

XMEM_SIDE, XMEM_TOKENS = 86, 128
_XMEM_CLASSES = {"mnasnet": 10, "mobilenet_v3": 10}
_XMEM_NAMES = {"mnasnet": "mnasnet1_0"}


_REWRITTEN = {
    "tresnet": "timm built it of in-place activated batch norms until 2023, which keep half as much"
}
"""Models of the tables of largest batches that today's libraries build otherwise, and how.

timm's pull request 1785 took in-place activated batch norms out of all of its models.
"""


class UnknownModelError(Exception):
    """No installed library has the model of that name."""


def workload_of(run: Run) -> Workload:
    """Build the workload of a run.

    Raises:
        UnknownModelError: no installed library has the model.
        KeyError: the optimizer is unknown.
    """
    optimizer = OPTIMIZERS[run.optimizer]
    if run.kind == "xmem":
        return _xmem_workload(run, optimizer)
    # torch 1.12, which ran the tables of largest batches, had no fused attention
    if run.kind == "max-batch" and (otherwise := _REWRITTEN.get(run.model.partition("_")[0])):
        raise UnknownModelError(otherwise)
    with _fused_attention(run.kind != "max-batch"):
        model = timm_model(run.model, run.image_size)
    inferred = infer(model, image_size=run.image_size)
    return Workload(
        model=model,
        batch=inferred.batch,
        loss=inferred.loss,
        optimizer=optimizer,
        autocast=None if run.precision == "fp32" else run.precision,
    )


@contextmanager
def _fused_attention(enabled: bool) -> Iterator[None]:
    """Let timm build models with or without `scaled_dot_product_attention`."""
    layers = importlib.import_module("timm.layers")
    before = layers.use_fused_attn()
    layers.set_fused_attn(enabled)
    try:
        yield
    finally:
        layers.set_fused_attn(before)


def timm_model(name: str, image_size: int | None) -> nn.Module:
    """Build a timm model, by an old name too, for images of a size where that is part of it.

    Raises:
        UnknownModelError: this timm does not have it.
    """
    timm = importlib.import_module("timm")
    renamed = timm.models.get_deprecated_models().get(name, name)
    architecture, _, tag = renamed.partition(".")
    if not timm.is_model(architecture):
        raise UnknownModelError(f"unknown to this timm ({timm.__version__})")
    # weights that were withdrawn took their tag with them
    found = renamed if not tag or timm.models.is_model_pretrained(renamed) else architecture
    with torch.device("meta"):
        model: nn.Module = timm.create_model(found, pretrained=False)
        built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
        if image_size and built_for and tuple(built_for) != (image_size, image_size):
            model = timm.create_model(found, pretrained=False, img_size=image_size)
    return model


def torchvision_name(name: str) -> str:
    """Return torchvision's name for a spelling such as "RegNetX400MF".

    Raises:
        UnknownModelError: this torchvision has none.
    """
    torchvision = importlib.import_module("torchvision")
    spelled = re.sub(r"[^a-z0-9]", "", name.lower())
    known = {found.replace("_", ""): found for found in torchvision.models.list_models()}
    found = _XMEM_NAMES.get(spelled) or known.get(spelled)
    if found is None:
        raise UnknownModelError(f"unknown to this torchvision ({torchvision.__version__})")
    return found


def _xmem_workload(run: Run, optimizer: Callable[[Any], torch.optim.Optimizer]) -> Workload:
    model, batch, forward = (
        _language_model(run.model) if run.model in CONFIGS else _classifier(run.model)
    )
    dtype = AUTOCAST_DTYPES.get(run.precision)
    return Workload(
        model=model, batch=batch, optimizer=optimizer, window=zero_first(forward, dtype)
    )


Forward = Callable[[nn.Module, Any], tuple[Any, Tensor]]


def zero_first(forward: Forward, dtype: torch.dtype | None = None) -> WindowFunction:
    """Return a window that begins with `zero_grad`, as xMem's runs do.

    As in a loop of plain variables, the batch, output and loss of one iteration live until the
    next one assigns its own.
    """
    variables: WeakKeyDictionary[torch.optim.Optimizer, SimpleNamespace]
    variables = WeakKeyDictionary()

    def autocast() -> AbstractContextManager[Any]:
        return nullcontext() if dtype is None else torch.autocast("cuda", dtype=dtype)

    def window(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any) -> None:
        alive = variables.setdefault(optimizer, SimpleNamespace())
        for batch in batches:
            optimizer.zero_grad()
            with autocast():
                alive.output, alive.loss = forward(model, batch)
            alive.loss.backward()
            optimizer.step()

    return window


def _classifier(name: str) -> tuple[nn.Module, Callable[[int], Any], Forward]:
    found = torchvision_name(name)
    classes = next((n for start, n in _XMEM_CLASSES.items() if found.startswith(start)), 1000)
    torchvision = importlib.import_module("torchvision")
    build = partial(torchvision.models.get_model, found, weights=None, num_classes=classes)
    try:
        with torch.device("meta"):
            model: nn.Module = build()
    except (NotImplementedError, RuntimeError):  # RegNet's constructor reads values
        model = build().to("meta")

    def batch(n: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(n, 3, XMEM_SIDE, XMEM_SIDE), torch.randint(classes, (n,))

    def forward(model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
        images, labels = batch
        output = model(images)
        return output, F.cross_entropy(output, labels)

    return model, batch, forward


def _language_model(name: str) -> tuple[nn.Module, Callable[[int], Any], Forward]:
    config_class, head, options = CONFIGS[name]
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, config_class)(**options)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, head)(config)

    def batch(n: int) -> dict[str, Tensor]:
        words = torch.randint(1, 1000, (n, XMEM_TOKENS))
        return {
            "input_ids": words,
            "attention_mask": torch.ones(n, XMEM_TOKENS, dtype=torch.int64),
            "labels": words.clone(),
        }

    def forward(model: nn.Module, batch: Any) -> tuple[Any, Tensor]:
        output = model(**batch)
        return output, output.loss

    return model, batch, forward
