"""Images and labels of classes: what timm and torchvision train on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from autobatch.workload.infer.fields import SURROGATE, Field, Inferred, builder

__all__ = ["HEAD_LAYERS", "classification", "cross_entropy", "last_features"]

# Weight of the auxiliary heads of GoogLeNet and Inception; it changes no memory.
AUXILIARY_WEIGHT = 0.3

HEAD_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def last_features(module: nn.Module | None) -> int:
    """Return the outputs of the last Linear or convolution inside a head; 0 where it has none."""
    layers = [m for m in (module.modules() if module else ()) if isinstance(m, HEAD_LAYERS)]
    if not layers:
        return 0
    last = layers[-1]
    return last.out_features if isinstance(last, nn.Linear) else last.out_channels


def classification(images: Field, classes: int, what: str) -> Inferred:
    """Return images, with labels and cross entropy where the model has classes."""
    dtype = str(images.dtype).removeprefix("torch.")
    note = f"inputs inferred: {dtype} images {what}"
    if classes == 0:
        return Inferred(batch=builder(images), loss=None, note=note, loss_note=SURROGATE)
    return Inferred(
        batch=builder((images, Field((), high=classes))),
        loss=cross_entropy,
        note=note,
        loss_note=f"loss inferred: cross entropy over {classes} classes",
    )


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Classify images; auxiliary outputs count as the model's authors trained them."""
    images, labels = batch
    output = model(images)
    if isinstance(output, Mapping):
        main, auxiliary = output["out"], [output["aux"]] if "aux" in output else []
    elif isinstance(output, Tensor):
        main, auxiliary = output, []
    else:
        main, *auxiliary = output
    loss = F.cross_entropy(main, labels)
    for extra in auxiliary:
        if extra is not None:
            loss = loss + AUXILIARY_WEIGHT * F.cross_entropy(extra, labels)
    return loss
