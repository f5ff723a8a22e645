"""Models of timm on `meta`, by name or drawn."""

from __future__ import annotations

import importlib
import logging
import random
import warnings
from collections.abc import Iterator
from itertools import islice

import torch
from torch import nn

LARGEST_PARAMETERS = 400_000_000


def build(name: str) -> nn.Module:
    """Build a timm model without making its weights.

    Raises:
        RuntimeError: the model's constructor reads values, which `meta` does not have.
    """
    timm = importlib.import_module("timm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def random_names(count: int, seed: int) -> Iterator[str]:
    """Yield different timm models below `LARGEST_PARAMETERS` that build on `meta`."""
    logging.getLogger("timm").setLevel(logging.ERROR)
    names: list[str] = importlib.import_module("timm").list_models()
    random.Random(seed).shuffle(names)
    return islice(filter(_is_eligible, names), count)


def _is_eligible(name: str) -> bool:
    try:
        model = build(name)
    except RuntimeError:
        return False
    return sum(p.numel() for p in model.parameters()) < LARGEST_PARAMETERS
