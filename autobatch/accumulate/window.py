"""One training window: micro-batches whose gradients add up to the effective batch's.

Invariant: the gradient that an update sees is that of the mean (over samples, or over `weight`) of
the whole window, on all ranks, however the window was cut.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autobatch.accumulate.batches import Piece
from autobatch.accumulate.ranks import Ranks, Tally
from autobatch.accumulate.update import Updater, free_caches
from autobatch.errors import AutobatchWarning, DoesNotFitError, UsageError, WorkloadError
from autobatch.support.oom import Shortage, attempt
from autobatch.workload.loss import checked_loss

__all__ = ["Micro", "Training", "Weight", "Window"]

Weight = Callable[[Any], "float | Tensor"]


@dataclass(slots=True, eq=False)
class Micro:
    """One micro-batch of a window, and its part of the window's loss once it ran."""

    piece: Piece
    weight: float
    repeats: bool = False  # runs again with weight 0, so that the other ranks need not wait
    loss: Tensor | None = None  # times the number of ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What all windows of a loader share.

    Attributes:
        ranks: the processes that train together.
        update: clips, steps and zeroes.
        weight: what a batch's loss is a mean over; its samples if None.
        sums: whether losses are sums, not means.
        retries: how often a window may run out of memory.
    """

    ranks: Ranks
    update: Updater
    weight: Weight | None
    sums: bool
    retries: int

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


class Window:
    """One training window: its micro-batches, then one update.

    Either iterate over it, calling `backward` once for each micro-batch, or call `run`, which also
    recovers from a lack of memory; then call `step`.

    Attributes:
        samples: samples of the window over all ranks: the effective batch, or less at the loader's
            end.
        weight: sum of their weights; the samples themselves where no weight was given.
        stepped: whether `step` was called.
        grad_norm: 2-norm of the gradients before clipping; None without clipping.
        skipped: whether the scaler left out the update, because gradients overflowed.
    """

    def __init__(
        self,
        training: Training,
        micros: list[Micro],
        total: Tally,
        *,
        number: int,
        largest: int,
        finish: Callable[[int, int], None],
    ) -> None:
        """Begin a window; `Windows` makes them.

        Args:
            training: what all windows share.
            micros: the micro-batches of this rank.
            total: the window over all ranks.
            number: of the window in its epoch, for messages.
            largest: micro-batch of the windows by now.
            finish: told, after the update, how often memory was short and the smallest micro-batch
                that followed from it.
        """
        self.samples = total.samples
        self.weight = total.weight
        self.stepped = False
        self.grad_norm: Tensor | None = None
        self.skipped = False
        self._training = training
        self._number = number
        self._finish = finish
        self._todo = deque(micros)
        self._ran: list[Micro] = []
        self._current: Micro | None = None
        self._in_backward = False
        self._shortages = 0
        self._smallest = largest
        self._loss: Tensor | None = None

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """Samples of the micro-batches that ran on this rank, repeated ones left out."""
        return tuple(micro.piece.samples for micro in self._ran if not micro.repeats)

    @property
    def loss(self) -> Tensor:
        """The window's loss over all ranks, weighted as its gradient is; a scalar on its device.

        Formatting it or calling `.item()` waits for the device; reading it here does not.

        Raises:
            WorkloadError: before `step`.
        """
        if self._loss is None:
            raise WorkloadError("the window's loss is known after window.step()")
        return self._loss

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's micro-batches; the last one's backward averages over the ranks."""
        while self._todo:
            micro = self._todo.popleft()
            with self._training.ranks.syncing(not self._todo, watched=False):
                self._current, self._in_backward = micro, False
                yield micro.piece.batch
                self._end(micro)

    def run(self, loss: Callable[[Any], Tensor]) -> None:
        """Run forward and backward of all micro-batches, split where memory runs out.

        A micro-batch that runs out of memory is split in two and tried again; where its backward
        pass had begun, the window's gradients are computed again from its first micro-batch. Under
        DistributedDataParallel the ranks agree on that. It takes a function, because variables of
        a loop would keep the failed attempt's tensors alive. Running statistics, such as those of
        BatchNorm, see repeated samples more than once.

        Args:
            loss: `loss(batch)` returns the loss of one micro-batch, as given to `backward`.

        Raises:
            DoesNotFitError: a single sample runs out of memory, or micro-batches did too often, or
                the ranks cannot recover (FSDP2, or DDP with `find_unused_parameters` or
                `static_graph`).
        """
        while True:
            spoiled = self._pass(loss)
            if not self._training.ranks.recovers or not self._training.ranks.any(spoiled):
                return
            self._again()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of the current micro-batch, with its share of the window's weight.

        May be called several times for losses that are added up.

        Args:
            loss: one value; the mean over the micro-batch's samples (or over its weight), or their
                sum where `reduction="sum"`.

        Raises:
            WorkloadError: no micro-batch is running, or the loss is no single value with a
                gradient.
        """
        micro = self._current
        if micro is None:
            raise WorkloadError(
                "window.backward(loss) without a micro-batch: call it in `for batch in window`"
            )
        loss = checked_loss(loss)
        share = (0.0 if micro.repeats else 1.0) if self._training.sums else micro.weight
        share /= self.weight
        factor = share * self._training.ranks.size  # DDP and FSDP2 average over the ranks
        weighted = loss if factor == 1 else loss * factor
        scaler = self._training.update.scaler
        self._in_backward = True
        (weighted if scaler is None else scaler.scale(weighted)).backward()
        value = weighted.detach()
        micro.loss = value if micro.loss is None else micro.loss + value

    def step(self) -> None:
        """Clip, update the parameters, step the schedule, drop the gradients; once a window.

        Raises:
            WorkloadError: micro-batches are left, or this was called before.
            DoesNotFitError: the update ran out of memory and could not be repeated.
        """
        if self.stepped:
            raise WorkloadError("window.step() was called twice")
        if self._todo or self._current is not None:
            left = len(self._todo) + (self._current is not None)
            raise WorkloadError(
                f"window.step() with {left} of {left + len(self._ran)} micro-batches left: call it "
                "after `for batch in window`, not inside"
            )
        values = [micro.loss.reshape(()) for micro in self._ran if micro.loss is not None]
        self._loss = self._training.ranks.sum(torch.stack(values).sum() / self._training.ranks.size)
        self.grad_norm, self.skipped = self._training.update()
        self.stepped = True
        self._finish(self._shortages, self._smallest)

    def _end(self, micro: Micro) -> None:
        self._current = None
        if micro.loss is None:
            raise WorkloadError(
                f"micro-batch {len(self._ran)} had no window.backward(loss): call it once for each"
            )
        self._ran.append(micro)

    def _pass(self, loss: Callable[[Any], Tensor]) -> bool:
        """Run what is left; return whether the gradients are spoiled and all must run again."""
        while self._todo:
            micro = self._todo.popleft()
            last = not self._todo
            shortage = attempt(partial(self._forward_backward, micro, loss, last))
            if not isinstance(shortage, Shortage):
                continue
            self._current = micro.loss = None
            self._note(micro, shortage)
            halves = self._halved(micro)
            free_caches()
            self._todo.extendleft(reversed(halves))
            if self._training.ranks.leave(in_backward=self._in_backward):
                return True
            if self._in_backward:
                self._again()
        return False

    def _forward_backward(self, micro: Micro, loss: Callable[[Any], Tensor], last: bool) -> None:
        with self._training.ranks.syncing(last, watched=True):
            self._current, self._in_backward = micro, False
            self.backward(loss(micro.piece.batch))
            self._end(micro)

    def _again(self) -> None:
        """Drop the gradients, and put the micro-batches that ran before those that did not."""
        self._training.update.zero()
        for micro in self._ran:
            micro.loss = None
        self._todo.extendleft(reversed(self._ran))
        self._ran.clear()

    def _note(self, micro: Micro, shortage: Shortage) -> None:
        """Count an out-of-memory error, and warn about the first one of the window."""
        samples, limit = micro.piece.samples, self._training.retries
        self._shortages += 1
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
        if self._shortages > limit:
            raise DoesNotFitError(
                f"micro-batches ran out of memory {self._shortages} times in one window, more than "
                f"retries={limit}; the last had {samples} samples: {shortage}"
            )
        self._smallest = min(self._smallest, (samples + 1) // 2)
        if self._shortages == 1:
            warnings.warn(
                f"window {self._number}: a micro-batch of {samples} ran out of memory "
                f"({shortage}) and is run in two halves; the effective batch stays "
                f"{self.samples} samples",
                AutobatchWarning,
                stacklevel=4,
            )

    def _halved(self, micro: Micro) -> list[Micro]:
        pieces = micro.piece.halves()
        if micro.repeats:
            return [Micro(piece, 0.0, True) for piece in pieces]
        weights = [self._training.weigh(piece) for piece in pieces]
        # the shares of all other micro-batches and ranks were computed with the whole one's weight
        scale = micro.weight / sum(weights)
        return [Micro(piece, w * scale) for piece, w in zip(pieces, weights, strict=True) if w]
