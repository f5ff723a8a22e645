"""Images and class labels, which the models of timm and torchvision train on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from autobatch.workload.infer.fields import Field, Inferred, builder

__all__ = ["HEAD_LAYERS", "classification", "cross_entropy", "last_features"]

# Weight of the auxiliary heads of GoogLeNet and Inception; it changes no memory.
AUXILIARY_WEIGHT = 0.3

HEAD_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def last_features(module: nn.Module | None) -> int:
    """Return the number of outputs of a head's last Linear or convolution; 0 without one."""
    layers = [m for m in (module.modules() if module else ()) if isinstance(m, HEAD_LAYERS)]
    if not layers:
        return 0
    last = layers[-1]
    return last.out_features if isinstance(last, nn.Linear) else last.out_channels


def classification(images: Field, classes: int, what: str) -> Inferred:
    """Return images as inputs, with labels and cross entropy where the model has classes.

    Args:
        images: the images.
        classes: how many classes the model tells apart; 0 if it is no classifier.
        what: the size of the images and where it is from, for the note.
    """
    dtype = str(images.dtype).removeprefix("torch.")
    inputs_note = f"inputs inferred: {dtype} images {what}"
    if classes == 0:
        return Inferred(batch=builder(images), inputs_note=inputs_note)
    return Inferred(
        batch=builder((images, Field((), high=classes))),
        loss=cross_entropy,
        inputs_note=inputs_note,
        loss_note=f"loss inferred: cross entropy over {classes} classes",
    )


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a classifier; auxiliary outputs weigh as in the authors' training."""
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
