"""Training windows over a loader: micro-batches whose gradients add up to the effective batch's.

Invariant: the gradient that an update sees is that of the mean (over samples, or over `weight`) of
the whole window, on all ranks, however the window was cut.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autobatch.accumulate.batches import Count, Cut, Piece, Pieces, Position, Reader
from autobatch.accumulate.ranks import Ranks, Share, Sync, Total, ranks_of
from autobatch.accumulate.update import Updater, free_caches
from autobatch.errors import AutobatchWarning, DoesNotFitError, UsageError, WorkloadError
from autobatch.support.oom import Shortage, attempt
from autobatch.workload.sample import BatchDims
from autobatch.workload.workload import checked_loss

__all__ = ["Window", "Windows"]

Weight = Callable[[Any], "float | Tensor"]
Reduction = Literal["mean", "sum"]

PATIENCE = 2
"""Windows that ran out of memory before the micro-batch is lowered for all that follow."""


@dataclass(slots=True, eq=False)
class _Micro:
    """One micro-batch of a window, and its part of the window's loss once it ran."""

    piece: Piece
    weight: float
    repeats: bool = False  # ran before, and weighs nothing: it keeps the ranks in step
    loss: Tensor | None = None  # times the number of ranks


class Windows:
    """The training windows of a loader, in any loop of one's own; made by `Plan.windows`.

    Iterating again begins a new epoch. See `windows` for the arguments.

    Attributes:
        sizes: micro-batches of this rank's window, in samples; smaller ones take their place after
            repeated lack of memory.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        sizes: Sequence[int],
        model: nn.Module | None = None,
        scheduler: Any = None,
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        weight: Weight | None = None,
        reduction: Reduction = "mean",
        batch_dims: BatchDims = None,
        count: Count | None = None,
        cut: Cut | None = None,
        drop_last: bool = False,
        group: torch.distributed.ProcessGroup | None = None,
        sync: Sync | None = None,
        retries: int = 8,
        guard_update: bool = False,
    ) -> None:
        self.sizes = tuple(sizes)
        if not self.sizes or any(isinstance(n, bool) or n != int(n) or n < 1 for n in self.sizes):
            raise UsageError(f"the micro-batches are {sizes!r}: give whole numbers of at least 1")
        if reduction not in ("mean", "sum"):
            raise UsageError(f"reduction is {reduction!r}: use 'mean' or 'sum', as the loss does")
        self._loader = loader
        self._reader = Reader(batch_dims=batch_dims, count=count, cut=cut)
        self._weight = weight
        self._drop_last = drop_last
        self._retries = retries
        self._sums = reduction == "sum"
        self._ranks = ranks_of(model, group=group, sync=sync)
        self._update = Updater(
            _listed(optimizer),
            schedulers=_listed(scheduler),
            clip_norm=clip_norm,
            scaler=scaler,
            guarded=guard_update,
        )
        self._position = Position()
        self._done = 0
        self._resumes = False
        self._short = 0
        self._spare: _Micro | None = None

    @property
    def samples(self) -> int:
        """Samples of one window on this rank."""
        return sum(self.sizes)

    def __len__(self) -> int:
        """Return the updates of one epoch, where the loader knows its samples.

        Raises:
            TypeError: it does not.
        """
        loader: Any = self._loader
        if getattr(loader, "batch_sampler", None) is None or loader.batch_size is None:
            raise TypeError("this loader does not tell its number of samples")
        samples = len(loader) * loader.batch_size if loader.drop_last else len(loader.sampler)
        return samples // self.samples if self._drop_last else math.ceil(samples / self.samples)

    def __iter__(self) -> Iterator[Window]:
        """Yield the windows of one epoch, or of what is left of it after `load_state_dict`.

        Raises:
            WorkloadError: the next window is asked for before `step` of the last one.
            SampleError: a batch of the loader cannot be read or cut.
            UsageError: a rank has no samples at all.
        """
        if not self._resumes:
            self._position, self._done = Position(), 0
        self._resumes = False
        pieces = Pieces(self._loader, self._reader, self._position)
        self._update.zero()
        while (window := self._next(pieces)) is not None:
            yield window
            if not window.stepped:
                raise WorkloadError(
                    f"window {self._done} was left before window.step(): its gradients would be "
                    "lost or mixed into the next window's"
                )
        self._position, self._done = Position(), 0

    def state_dict(self) -> dict[str, Any]:
        """Return where in the epoch the next window begins, to save beside the optimizer's state.

        Between a window's first micro-batch and its `step` it is where that window began. A loader
        that has a `state_dict` of its own is not asked for it: its batches are skipped by reading.
        """
        return {
            "windows": self._done,
            "batches": self._position.batches,
            "samples": self._position.samples,
            "sizes": list(self.sizes),
            "short": self._short,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the middle of an epoch; the loader must give its batches in the same order.

        Raises:
            UsageError: the state is of windows with another number of samples.
        """
        if sum(state["sizes"]) != self.samples:
            raise UsageError(
                f"the saved windows have {sum(state['sizes'])} samples and these {self.samples}: "
                "resume with the same target and number of ranks"
            )
        self.sizes = tuple(state["sizes"])
        self._position = Position(state["batches"], state["samples"])
        self._done, self._short = state["windows"], state["short"]
        self._resumes = True

    def _next(self, pieces: Pieces) -> Window | None:
        """Draw a window on which all ranks agree; None at the end of the loader."""
        while True:
            drawn = pieces.window(self.sizes)
            if self._drop_last and sum(piece.samples for piece in drawn) < self.samples:
                drawn = []
            micros = [_Micro(piece, self._weigh(piece)) for piece in drawn]
            # a loss that is a mean over nothing is not a number, and would spoil the others
            micros = [micro for micro in micros if micro.weight]
            self._spare = micros[-1] if micros else self._spare
            total = self._ranks.total(
                Share(
                    weight=sum(micro.weight for micro in micros),
                    samples=sum(piece.samples for piece in drawn),
                    micro_batches=len(micros),
                    can_go_on=self._spare is not None,
                )
            )
            if not total.samples:
                self._spare = None
                return None
            if total.weight:
                return Window(self, self._in_step(micros, total), total, pieces.position)
            warnings.warn(
                f"window {self._done} has a weight of 0 over all its {total.samples} samples: it "
                "is left out",
                AutobatchWarning,
                stacklevel=2,
            )
            self._position = pieces.position

    def _weigh(self, piece: Piece) -> float:
        if self._weight is None:
            return float(piece.samples)
        weight = float(self._weight(piece.batch))
        if not 0 <= weight < math.inf:
            raise UsageError(f"weight(batch) gives {weight}: it has to be at least 0, and finite")
        return weight

    def _in_step(self, micros: list[_Micro], total: Total) -> list[_Micro]:
        """Add what this rank has to repeat so that no other waits for it."""
        spare = self._spare
        if spare is None or not total.all_can_go_on:
            raise UsageError(
                "the loader of a rank has no samples, or none that weigh anything: give every rank "
                "a part of the data, as DistributedSampler does"
            )
        needed = total.micro_batches if self._ranks.alike else 1
        missing = max(0, needed - len(micros))
        return [*(_Micro(spare.piece, 0.0, True) for _ in range(missing)), *micros]

    def _finish(self, position: Position, *, shortages: int, smallest: int) -> None:
        """Count a window that is done; lower the micro-batch where memory was short repeatedly."""
        self._position = position
        self._done += 1
        self._short = self._short + 1 if shortages else self._short
        if self._short < PATIENCE or smallest >= max(self.sizes):
            return
        count = math.ceil(self.samples / smallest)
        size, larger = divmod(self.samples, count)
        before, self.sizes = self.sizes, tuple(size + (at < larger) for at in range(count))
        self._short = 0
        warnings.warn(
            f"{PATIENCE} windows ran out of memory: the micro-batch is lowered from {max(before)} "
            f"to {max(self.sizes)} for all that follow, with {count} accumulation steps instead of "
            f"{len(before)}; the effective batch stays {self.samples} samples a rank",
            AutobatchWarning,
            stacklevel=3,
        )


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

    def __init__(self, windows: Windows, micros: list[_Micro], total: Total, end: Position) -> None:
        self.samples = total.samples
        self.weight = total.weight
        self.stepped = False
        self.grad_norm: Tensor | None = None
        self.skipped = False
        self._windows = windows
        self._end_position = end
        self._ranks: Ranks = windows._ranks
        self._todo = deque(micros)
        self._ran: list[_Micro] = []
        self._current: _Micro | None = None
        self._in_backward = False
        self._shortages = 0
        self._smallest = max(windows.sizes)
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
            with self._ranks.syncing(not self._todo, watched=False):
                self._current, self._in_backward = micro, False
                yield micro.piece.batch
                self._end(micro)

    def run(self, loss: Callable[[Any], Tensor]) -> None:
        """Run forward and backward of all micro-batches, whatever memory allows.

        A micro-batch that runs out of memory is split in two and tried again; where its backward
        pass had begun, the window's gradients are computed again from its first micro-batch. Under
        DistributedDataParallel the ranks agree on that. Only a function can be tried again
        without what the failed attempt left in the loop's variables. Layers that keep running
        statistics see the samples that are repeated once more.

        Args:
            loss: `loss(batch)` returns the loss of one micro-batch, as given to `backward`.

        Raises:
            DoesNotFitError: a single sample runs out of memory, or micro-batches did too often, or
                the ranks cannot recover (FSDP2, or DDP with `find_unused_parameters` or
                `static_graph`).
        """
        while True:
            spoiled = self._pass(loss)
            if not self._ranks.recovers or not self._ranks.any(spoiled):
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
        share = (0.0 if micro.repeats else 1.0) if self._windows._sums else micro.weight
        share /= self.weight
        factor = share * self._ranks.size  # DDP and FSDP2 average over the ranks
        weighted = loss if factor == 1 else loss * factor
        scaler = self._windows._update.scaler
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
        self._loss = self._ranks.sum(torch.stack(values).sum() / self._ranks.size)
        updated = self._windows._update()
        self.grad_norm, self.skipped = updated.norm, updated.skipped
        self.stepped = True
        self._windows._finish(
            self._end_position, shortages=self._shortages, smallest=self._smallest
        )

    def _end(self, micro: _Micro) -> None:
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
            if self._ranks.leave(in_backward=self._in_backward):
                return True
            if self._in_backward:
                self._again()
        return False

    def _forward_backward(self, micro: _Micro, loss: Callable[[Any], Tensor], last: bool) -> None:
        with self._ranks.syncing(last, watched=True):
            self._current, self._in_backward = micro, False
            self.backward(loss(micro.piece.batch))
            self._end(micro)

    def _again(self) -> None:
        """Drop the gradients, and put the micro-batches that ran before those that did not."""
        self._windows._update.zero()
        for micro in self._ran:
            micro.loss = None
        self._todo.extendleft(reversed(self._ran))
        self._ran.clear()

    def _note(self, micro: _Micro, shortage: Shortage) -> None:
        """Count a lack of memory, and say once what is done about it."""
        samples, limit = micro.piece.samples, self._windows._retries
        self._shortages += 1
        if not self._ranks.recovers:
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
                f"window {self._windows._done}: a micro-batch of {samples} ran out of memory "
                f"({shortage}) and is run in two halves; the effective batch stays "
                f"{self.samples} samples",
                AutobatchWarning,
                stacklevel=4,
            )

    def _halved(self, micro: _Micro) -> list[_Micro]:
        pieces = micro.piece.halves()
        if micro.repeats:
            return [_Micro(piece, 0.0, True) for piece in pieces]
        weights = [self._windows._weigh(piece) for piece in pieces]
        # the other micro-batches, and ranks, count on the weight that the whole one had
        scale = micro.weight / sum(weights)
        return [_Micro(piece, w * scale) for piece, w in zip(pieces, weights, strict=True) if w]


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
