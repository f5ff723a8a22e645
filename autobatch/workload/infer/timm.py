"""Inputs of timm's models, from their `pretrained_cfg`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from autobatch.workload.infer.fields import Field, Inferred, float_dtype, pair
from autobatch.workload.infer.images import classification, last_features

__all__ = ["infer_timm", "pretrained_cfg"]


def pretrained_cfg(model: nn.Module) -> Mapping[str, Any]:
    """Return timm's description of a model; an empty one for other models."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return cfg if isinstance(cfg, Mapping) else {}


def infer_timm(model: Any, image_size: int | None) -> Inferred:
    """Return images with the channels of the stem, in the size that the model is built for."""
    channels, *size = pretrained_cfg(model)["input_size"]
    stem = _timm_stem(model)
    if stem is not None and stem.groups == 1:
        # The user's `in_chans` may differ from the config's; SpaceToDepth folds blocks of pixels
        # into channels before the stem.
        blocks = (m.bs for m in model.modules() if type(m).__name__ == "SpaceToDepth")
        channels = stem.in_channels // next(blocks, 1) ** 2
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = pair(image_size or built_for or size)
    images = Field((channels, height, width), float_dtype(model))

    heads = model.get_classifier() if hasattr(model, "get_classifier") else None
    head = heads[0] if isinstance(heads, (tuple, list)) else heads
    return classification(
        images, last_features(head), f"{channels} x {height} x {width} from timm's pretrained_cfg"
    )


def _timm_stem(model: Any) -> nn.Conv2d | None:
    """Return the convolution that takes the images, where the config names one.

    The first among the modules may be another, on channels into which pixels were folded.
    """
    named = pretrained_cfg(model).get("first_conv")
    try:
        stem = model.get_submodule(named) if isinstance(named, str) else None
    except AttributeError:
        return None
    return stem if isinstance(stem, nn.Conv2d) else None
