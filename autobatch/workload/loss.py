"""The loss of a micro-batch: the user's, checked, or found in what the model returns.

Invariant: whatever a backward pass begins with here is one value that has a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from autobatch.errors import WorkloadError
from autobatch.workload.tree import tensors

__all__ = ["DefaultLoss", "checked_loss", "output_of"]


def checked_loss(value: Any) -> Tensor:
    """Return what a loss function gave, if a backward pass can begin with it.

    Raises:
        WorkloadError: it is no tensor, not a scalar, or has no gradient.
    """
    if not isinstance(value, Tensor):
        raise WorkloadError(
            f"the loss is a {type(value).__name__}, not a tensor: return the scalar loss from "
            "loss(model, batch)"
        )
    if value.dim() and value.numel() != 1:
        raise WorkloadError(
            f"the loss has shape {tuple(value.shape)}, not one value: reduce it, "
            "for instance with .mean()"
        )
    if not value.requires_grad:
        raise WorkloadError(
            "the loss has no gradient: check that parameters require gradients and that the loss "
            "was not detached or computed under no_grad"
        )
    return value


def output_of(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: mappings become keywords, lists and tuples arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (list, tuple)) else model(batch)


class DefaultLoss:
    """Find a loss in what the model returns, and remember how.

    The output lives until the next one has been computed, as in the loops of most examples:
    `outputs = model(**batch)`, then `outputs.loss`.

    Attributes:
        kind: "output.loss", "mean of output.loss", "scalar output" or "surrogate sum"; None before
            the first call.
    """

    def __init__(self) -> None:
        self.kind: str | None = None
        self._output: Any = None

    def forget(self) -> None:
        """Let the last output go, as the end of a loop's function does."""
        self._output = None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Call the model on the batch and return the loss.

        Raises:
            WorkloadError: the model returns no floating-point tensor.
        """
        output = self._output = output_of(model, batch)
        named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(named, Tensor):
            if named.numel() == 1:
                self.kind = "output.loss"
                return named
            self.kind = "mean of output.loss"  # one value a sample: a loop has to reduce it
            return named.mean()
        if isinstance(output, Tensor) and output.numel() == 1:
            self.kind = "scalar output"
            return output
        floating = [tensor for tensor in tensors(output) if tensor.is_floating_point()]
        if not floating:
            raise WorkloadError(
                f"the model returns {type(output).__name__} without a floating-point tensor: "
                "pass loss=lambda model, batch: …"
            )
        self.kind = "surrogate sum"
        return self.stand_in(floating)

    def stand_in(self, outputs: Sequence[Tensor]) -> Tensor:
        """Make a scalar of the floating-point outputs, where no loss is known."""
        total = outputs[0].sum()
        for output in outputs[1:]:
            total = total + output.sum()
        return total
