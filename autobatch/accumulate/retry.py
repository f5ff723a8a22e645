"""What runs in place of a micro-batch that ran out of memory: its two halves, while there is a way.

Invariant: the halves together have the weight that the micro-batch had in its window.
"""

from __future__ import annotations

import warnings

from autobatch.accumulate.micro import Micro, Training
from autobatch.errors import AutobatchWarning, DoesNotFitError
from autobatch.support.oom import Shortage

__all__ = ["Shortages"]


class Shortages:
    """The out-of-memory errors of one window.

    Attributes:
        count: how many there were.
        smallest: the smallest micro-batch that followed from them; the largest of all without any.
    """

    def __init__(self, training: Training, samples: int, *, number: int, largest: int) -> None:
        """Begin a window of some samples over all ranks; `number` is for messages."""
        self._training, self._samples, self._number = training, samples, number
        self.count = 0
        self.smallest = largest

    def halves(self, micro: Micro, shortage: Shortage) -> list[Micro]:
        """Count an error, and return the halves of its micro-batch that weigh anything.

        The first one of the window is a warning.

        Raises:
            DoesNotFitError: it has a single sample or was written to, or there were too many, or
                the other ranks cannot be told.
        """
        samples, limit = micro.piece.samples, self._training.retries
        self.count += 1
        if not self._training.ranks.recovers:
            raise DoesNotFitError(
                f"a micro-batch of {samples} ran out of memory ({shortage}), and under FSDP2, "
                "find_unused_parameters or static_graph the other ranks cannot be told: plan with "
                "more headroom"
            )
        if samples == 1:
            raise DoesNotFitError(
                f"a micro-batch of one sample runs out of memory: {shortage}; make it smaller "
                "(shorter sequences, smaller images), or use activation checkpointing"
            )
        if self.count > limit:
            raise DoesNotFitError(
                f"micro-batches ran out of memory {self.count} times in one window, more than "
                f"retries={limit}; the last had {samples} samples: {shortage}"
            )
        if micro.wrote:
            raise DoesNotFitError(
                f"a micro-batch of {samples} ran out of memory ({shortage}) and cannot run again: "
                "the loss function writes to its tensors in place; let it write to copies"
            )
        self.smallest = min(self.smallest, (samples + 1) // 2)
        if self.count == 1:
            warnings.warn(
                f"window {self._number}: a micro-batch of {samples} ran out of memory "
                f"({shortage}) and is run in two halves; the effective batch stays "
                f"{self._samples} samples",
                AutobatchWarning,
                stacklevel=4,
            )
        pieces = micro.piece.halves()
        if micro.repeats:
            return [Micro(piece, 0.0, True) for piece in pieces]
        weights = [self._training.weigh(piece) for piece in pieces]
        # the shares of all other micro-batches and ranks were computed with the whole one's weight
        scale = micro.weight / sum(weights)
        return [Micro(piece, w * scale) for piece, w in zip(pieces, weights, strict=True) if w]
