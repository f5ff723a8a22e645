"""What windows are made of: micro-batches, and what all windows of a loader share.

Invariant: a factor multiplies the gradient of a loss, never the loss that the user sees.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autobatch.accumulate.agreement import Ranks
from autobatch.accumulate.batches import Piece
from autobatch.accumulate.rewind import Rewind
from autobatch.accumulate.update import Updater
from autobatch.accumulate.watch import Watch
from autobatch.errors import AutobatchWarning, UsageError, WorkloadError

__all__ = ["Backward", "Micro", "Training", "Weight"]

Weight = Callable[[Any], "float | Tensor"]
Backward = Callable[..., Any]


@dataclass(slots=True, eq=False)
class Micro:
    """One micro-batch of a window, and what became of it.

    Attributes:
        piece: its samples.
        weight: its part of the window's.
        repeats: whether it runs again with weight 0, so that the other ranks need not wait.
        losses: those that had their backward pass, each with its factor.
        is_skipped: whether the user left it out.
        wrote: whether the loop wrote into its tensors, so that it cannot run again.
    """

    piece: Piece
    weight: float
    repeats: bool = False
    losses: list[tuple[Tensor, float]] = field(default_factory=list)
    is_skipped: bool = False
    wrote: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What all windows of a loader share.

    Attributes:
        ranks: the processes that train together.
        update: clips, steps and zeroes.
        watch: notices what else touches gradients.
        rewind: puts back what a repeated pass changed.
        weight: what a batch's loss is a mean over; its samples if None.
        sums: whether losses are sums, not means.
        retries: how often a window may run out of memory.
        backward: what runs a backward pass in place of `Tensor.backward`.
    """

    ranks: Ranks
    update: Updater
    watch: Watch
    rewind: Rewind
    weight: Weight | None
    sums: bool
    retries: int
    backward: Backward | None
    _seeds: dict[float, Tensor] = field(default_factory=dict)

    def weigh(self, piece: Piece) -> float:
        """Return the weight of some samples.

        Raises:
            UsageError: the user's function gives a negative or infinite one.
        """
        if self.weight is None:
            return float(piece.samples)
        weight = float(self.weight(piece.batch))
        if not 0 <= weight < math.inf:
            raise UsageError(f"weight(batch) gives {weight}: it has to be at least 0, and finite")
        return weight

    def run_backward(self, loss: Tensor, factor: float, *, retain_graph: bool) -> None:
        """Run the backward pass of a loss times a factor."""
        scaler = self.update.scaler
        if self.backward is not None:
            weighted = loss * factor
            scaled = weighted if scaler is None else scaler.scale(weighted)
            self.backward(scaled, **({"retain_graph": True} if retain_graph else {}))
            return
        scaled = loss if scaler is None else scaler.scale(loss)
        seed = self._seed(scaled, factor)
        scaled.backward(seed, retain_graph=retain_graph)
        if seed is not None and seed._version:  # a hook of the loss wrote to it
            self._seeds.clear()

    def _seed(self, loss: Tensor, factor: float) -> Tensor | None:
        """Return the factor as the gradient that a backward pass begins with."""
        if factor == 1 and not loss.dim():
            return None
        if type(loss) is not Tensor:
            return torch.full_like(loss.detach(), factor)
        seed = self._seeds.get(factor)
        if seed is None or seed.dtype != loss.dtype or seed.device != loss.device:
            if len(self._seeds) > 64:
                self._seeds.clear()
            seed = torch.full((), factor, dtype=loss.dtype, device=loss.device)
            self._seeds[factor] = seed
        return seed.expand(loss.shape) if loss.dim() else seed

    def check_unscaled(self, loss: Tensor, micro: Micro, steps: int) -> None:
        """Look at how a loss ends, in the first micro-batch: what windows do is not done twice.

        A sum over samples is divided by their number, which the number of micro-batches may equal.

        Raises:
            WorkloadError: it was scaled by the scaler.
        """
        node: Any = loss.grad_fn
        other = getattr(node, "_saved_other", None)
        if not isinstance(other, Tensor) or other.numel() != 1:
            return
        scaler = self.update.scaler
        if scaler is not None and float(other) == scaler.get_scale() != 1:
            raise WorkloadError(
                "the loss was multiplied by the scaler's scale: give window.backward the loss as "
                "it is, the scaler that was passed to the windows scales it"
            )
        if float(other) in (micro.weight, micro.piece.samples):
            return
        if steps > 1 and node.name().startswith("Div") and float(other) == steps:
            warnings.warn(
                f"the loss was divided by {steps}, the number of micro-batches, which a window "
                "does itself: take the division out, if it was for that",
                AutobatchWarning,
                stacklevel=4,
            )
