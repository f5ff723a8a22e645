"""What Accelerate does to a model that a plan has to count."""

from __future__ import annotations

from accelerate.utils import convert_outputs_to_fp32
from torch import nn

__all__ = ["return_fp32"]


def return_fp32(model: nn.Module) -> None:
    """Let a model return fp32 in place of half precision, as `Accelerator.prepare` does in place.

    The copy that this makes of the output is memory that a run under autocast needs. Call it on the
    model that a loss is given, which is a copy.

    Example:
        >>> def loss(model, batch):
        ...     return_fp32(model)
        ...     return model(**batch).loss
    """
    if "forward" not in vars(model):
        model.forward = convert_outputs_to_fp32(model.forward)
