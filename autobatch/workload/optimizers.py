"""The optimizers of PyTorch that go by a name."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from autobatch.errors import UsageError
from autobatch.support.wording import near

if TYPE_CHECKING:
    from autobatch.workload.workload import OptimizerSpec

__all__ = ["OPTIMIZERS", "named_optimizer"]

OPTIMIZERS = {
    "adadelta": "Adadelta",
    "adafactor": "Adafactor",
    "adagrad": "Adagrad",
    "adam": "Adam",
    "adamax": "Adamax",
    "adamw": "AdamW",
    "nadam": "NAdam",
    "radam": "RAdam",
    "rmsprop": "RMSprop",
    "sgd": "SGD",
    "sgd-momentum": "SGD",
}
"""Names, as on the command line, of classes in `torch.optim`."""


def named_optimizer(name: str) -> OptimizerSpec:
    """Return an optimizer by its name, with PyTorch's defaults.

    Raises:
        UsageError: none has that name.

    >>> named_optimizer("AdamW").__name__
    'AdamW'
    """
    import torch

    known = name.lower()
    if known not in OPTIMIZERS:
        names = ", ".join(OPTIMIZERS)
        hint = near(known, OPTIMIZERS)
        raise UsageError(f"optimizer is {name!r}, which is no name of one{hint}; known: {names}")
    kind: OptimizerSpec = getattr(torch.optim, OPTIMIZERS[known])
    if known == "sgd-momentum":
        return partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    return kind
