"""One training window: micro-batches whose gradients add up to the effective batch's.

Invariant: the gradient that an update sees is that of the mean (over samples, or over `weight`) of
the whole window, on all ranks, however the window was cut; otherwise the window raises.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autobatch.accumulate.agreement import At, Ranks, Tally
from autobatch.accumulate.batches import Piece, handed
from autobatch.accumulate.rewind import Mark, Rewind
from autobatch.accumulate.update import Updater, free_caches
from autobatch.accumulate.watch import Watch, versions
from autobatch.errors import AutobatchWarning, DoesNotFitError, UsageError, WorkloadError
from autobatch.support.oom import Shortage, attempt
from autobatch.workload.loss import checked_loss

__all__ = ["Backward", "Micro", "Training", "Weight", "Window"]

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

    def check_unscaled(self, loss: Tensor, steps: int) -> None:
        """Look at how a loss ends, in the first micro-batch: what windows do is not done twice.

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
        if steps > 1 and node.name().startswith("Div") and float(other) == steps:
            warnings.warn(
                f"the loss was divided by {steps}, the number of micro-batches, which a window "
                "does itself: take the division out, if it was for that",
                AutobatchWarning,
                stacklevel=4,
            )


class Window:
    """One training window: its micro-batches, then one update.

    Either iterate over it, calling `backward` once for each micro-batch, or call `run`, which also
    recovers from a lack of memory; then call `step`. What touches the gradients or the parameters
    of the optimizers in between is an error, as the update would not be that of the window.

    Attributes:
        samples: samples of the window over all ranks: the effective batch, or less at the loader's
            end or where micro-batches were skipped.
        weight: sum of their weights; the samples themselves where no weight was given.
        stepped: whether `step` was called.
        grad_norm: 2-norm of the gradients before clipping; None without clipping.
        skipped: whether the update was left out, because gradients overflowed or every micro-batch
            was skipped.
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
        self._has_begun = False
        self._mark: Mark | None = None
        self._in_backward = False
        self._is_broken = False  # a backward pass began and did not end
        self._is_left = False
        self._is_whole = False  # all micro-batches have run, on all ranks
        self._shortages = 0
        self._smallest = largest
        self._loss: Tensor | None = None
        self._skipped_samples = 0
        self._scale = 1.0  # what gradients were multiplied by, where micro-batches were skipped

    @property
    def has_run(self) -> bool:
        """Whether all micro-batches have run, or the window will have no update."""
        return self._is_whole or self.stepped

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """Samples of the micro-batches that ran on this rank, repeated ones left out."""
        return tuple(m.piece.samples for m in self._ran if not m.repeats and not m.is_skipped)

    @property
    def loss(self) -> Tensor:
        """The window's loss over all ranks, weighted as its gradient is; a scalar on its device.

        Formatting it or calling `.item()` waits for the device; reading it here does not.

        Raises:
            WorkloadError: before `step`.
        """
        if not self.stepped:
            raise WorkloadError("the window's loss is known after window.step()")
        if self._loss is None:
            self._loss = self._total()
        return self._loss

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's micro-batches; the last one's backward averages over the ranks.

        Raises:
            WorkloadError: they ran before, a micro-batch had no backward pass, or something else
                changed gradients or parameters.
        """
        self._begin()
        ranks, todo = self._training.ranks, self._todo
        is_shared = ranks.size > 1
        while todo:
            micro = todo.popleft()
            try:
                if is_shared:
                    ranks.begin_micro_batch(not todo)
                self._current, self._in_backward = micro, False
                batch, tensors = handed(micro.piece.batch)
                before = versions(tensors)
                yield batch
                micro.wrote = versions(tensors) != before
                self._end(micro)
            except GeneratorExit:
                ranks.end_micro_batch()
                self._leave(micro)
                raise
            except Exception as error:
                ranks.end_micro_batch()
                ranks.give_up(error, in_pass=True)
                raise
            if is_shared:
                ranks.end_micro_batch()
        self._complete()

    def run(self, loss: Callable[[Any], Tensor]) -> None:
        """Run forward and backward of all micro-batches, split where memory runs out.

        A micro-batch that runs out of memory is split in two and tried again; where its backward
        pass had begun, the window's gradients are computed again from its first micro-batch, with
        buffers, random states and gradients of other leaves as they were then. Under
        DistributedDataParallel the ranks agree on that. It takes a function, because variables of
        a loop would keep the failed attempt's tensors alive. Buffers (running statistics, such as
        those of BatchNorm) are put back where the windows were given `model=`.

        Args:
            loss: `loss(batch)` returns the loss of one micro-batch, as given to `backward`; None
                after `skip()`.

        Raises:
            DoesNotFitError: a single sample runs out of memory, or micro-batches did too often, or
                the ranks cannot recover (FSDP2, or DDP with `find_unused_parameters` or
                `static_graph`), or a micro-batch that has to run again was written to.
            WorkloadError: as in iterating; or another rank cannot go on.
        """
        self._begin()
        ranks = self._training.ranks
        self._mark = self._training.rewind.begin()
        in_pass = True
        try:
            while True:
                spoiled = self._pass(loss)
                in_pass = False
                if not ranks.recovers or not ranks.any(spoiled, At.PASSED):
                    break
                in_pass = True
                self._repeat()
        except Exception as error:
            ranks.give_up(error, in_pass=in_pass)
            self._todo.clear()
            self._current, self._is_left = None, True
            self._training.update.zero()
            raise
        self._training.rewind.end(self._mark)
        self._mark = None
        self._complete()

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Run the backward pass of the current micro-batch, with its share of the window's weight.

        May be called several times for losses that are added up.

        Args:
            loss: one value; the mean over the micro-batch's samples (or over its weight), or their
                sum where `reduction="sum"`.
            retain_graph: keep the graph, for another loss of the same forward pass.

        Raises:
            WorkloadError: no micro-batch is running, or the loss is no single value with a
                gradient, or something else changed the window's gradients, or the ranks would not
                average this backward pass.
        """
        micro = self._current
        if micro is None:
            raise WorkloadError(
                "window.backward(loss) without a micro-batch: call it in `for batch in window`"
            )
        if micro.is_skipped:
            raise WorkloadError("window.backward(loss) for a micro-batch that was skipped")
        if self._is_broken:
            self._check_whole()
        loss = checked_loss(loss)
        if loss.dtype in (torch.float16, torch.bfloat16):
            loss = loss.float()  # so that neither a scale nor a share is rounded
        training, ranks = self._training, self._training.ranks
        share = (0.0 if micro.repeats else 1.0) if training.sums else micro.weight
        factor = share / self.weight * ranks.size  # DDP and FSDP2 average over the ranks
        averages = ranks.size > 1 and ranks.averages(not self._todo)
        watch = training.watch
        watch.before_backward()
        if averages:
            watch.before_move()
            ranks.before_average()
        if self._number == 0 and not self._ran and not micro.losses:
            training.check_unscaled(loss, len(self._todo) + 1)
        self._in_backward = self._is_broken = True
        training.run_backward(loss, factor, retain_graph=retain_graph)
        self._is_broken = False
        if averages:
            ranks.after_average()
        watch.after_backward(averaged=averages)
        micro.losses.append((loss.detach(), factor))

    def skip(self) -> None:
        """Leave out the current micro-batch, or, after a `break`, what is left of the window.

        In `for batch in window`, and in the function that `run` calls, the current micro-batch has
        no part in the window: its gradient is that of the mean over all others. Outside, the
        window ends without an update, its gradients are dropped and the next window may begin.

        Raises:
            WorkloadError: the micro-batch had its backward pass, or the window its update.
            UsageError: other ranks wait for this micro-batch.

        >>> from autobatch import windows
        >>> model = torch.nn.Linear(3, 1)
        >>> loader = torch.tensor([[1.0], [math.nan], [3.0], [4.0]]).expand(4, 3).split(1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for window in windows(loader, optimizer, micro_batch=1, accumulation_steps=4):
        ...     for batch in window:
        ...         if batch.isnan().any():
        ...             window.skip()
        ...             continue
        ...         window.backward(model(batch).square().mean())
        ...     window.step()
        ...     print(window.samples)
        3
        """
        micro, ranks = self._current, self._training.ranks
        if self.stepped:
            raise WorkloadError("window.skip() after window.step(): the update is done")
        if micro is not None:
            self._check_whole()
        if micro is None:
            if not self._is_whole:
                ranks.give_up(self._left(), in_pass=True)
            self._todo.clear()
            self._drop()
            return
        if not ranks.skips:
            raise UsageError(
                "window.skip() under FSDP2, find_unused_parameters or static_graph, where the "
                "other ranks wait for this one: give such samples no weight, with weight="
            )
        if micro.losses:
            raise WorkloadError("window.skip() after window.backward(loss) of the same micro-batch")
        micro.is_skipped = True

    def _check_whole(self) -> None:
        """Raise a WorkloadError after a backward pass that was cut short in a loop."""
        if self._is_broken:
            raise WorkloadError(
                "a backward pass of this window failed halfway, so a part of its gradient is "
                "there: break out of the window, and leave it by window.skip()"
            )

    def again(self) -> None:
        """Drop the gradients, so that the same micro-batches can run once more before the update.

        For updates that look twice, such as those of sharpness-aware minimization: parameters may
        be changed before and after it, as long as they are not while micro-batches run.

        Raises:
            WorkloadError: the window has not run to its end, or was written to, or had its update.

        >>> from autobatch import windows
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for window in windows([torch.ones(4, 3)], optimizer, micro_batch=2,
        ...                       accumulation_steps=2):
        ...     window.run(lambda batch: model(batch).square().mean())
        ...     ascent = [0.05 * p.grad for p in model.parameters()]
        ...     with torch.no_grad():
        ...         _ = [p.add_(a) for p, a in zip(model.parameters(), ascent)]
        ...     window.again()
        ...     window.run(lambda batch: model(batch).square().mean())
        ...     with torch.no_grad():
        ...         _ = [p.sub_(a) for p, a in zip(model.parameters(), ascent)]
        ...     window.step()
        """
        if self.stepped:
            raise WorkloadError("window.again() after window.step(): the update is done")
        if not self._is_whole or self._is_left:
            raise WorkloadError("window.again() before all micro-batches of the window have run")
        if any(micro.wrote for micro in self._ran):
            raise WorkloadError(
                "window.again() cannot give micro-batches again whose tensors were written to in "
                "place: write to copies"
            )
        self._training.ranks.any(False, At.AGAIN)
        self._rewound()

    def step(self) -> None:
        """Clip, update the parameters, step the schedule, drop the gradients; once a window.

        Raises:
            WorkloadError: micro-batches are left, or this was called before, or another rank cannot
                go on.
            DoesNotFitError: the update ran out of memory and could not be repeated.
        """
        if self.stepped:
            raise WorkloadError("window.step() was called twice")
        if not self._is_whole or self._is_left:
            left = len(self._todo) + (self._current is not None or self._is_left)
            raise WorkloadError(
                f"window.step() with {left} of {left + len(self._ran)} micro-batches left: call it "
                "after `for batch in window`, not inside; after a break, window.skip() leaves the "
                "window without an update"
            )
        training, ranks = self._training, self._training.ranks
        self.samples, self._skipped_samples = self.samples - self._skipped_samples, 0
        if not self._scale:
            warnings.warn(
                f"window {self._number} has no update: all of its micro-batches were skipped",
                AutobatchWarning,
                stacklevel=2,
            )
            self._drop()
            return
        self.weight /= self._scale
        try:
            self.grad_norm, self.skipped = training.update(partial(ranks.any, at=At.UNSCALED))
            ranks.any(False, At.UPDATED)  # whether all ranks did their update
            if ranks.size > 1:
                self._loss = ranks.sum(self._total().double() / ranks.size)
        except Exception as error:
            ranks.give_up(error, in_pass=False)
            raise
        self.stepped = True
        ranks.end_window()
        self._finish(self._shortages, self._smallest)

    def _begin(self) -> None:
        """Begin the window's gradients, unless a part of its micro-batches ran."""
        if self.stepped or self._is_left or (not self._todo and self._ran):
            raise WorkloadError(
                "the micro-batches of this window have run: window.again() gives them once more, "
                "with the gradients of the first time dropped"
            )
        if self._current is not None:
            raise WorkloadError("the micro-batches of this window are running")
        if not self._has_begun:
            self._begin_gradients()

    def _begin_gradients(self) -> None:
        self._has_begun = True
        self._is_broken = False
        update, ranks = self._training.update, self._training.ranks
        try:
            ranks.begin_window(update.parameters)
        except UsageError as error:
            ranks.give_up(error, in_pass=True)
            raise
        if self._training.watch.begin(update.parameters):
            update.zero()
        update.is_open = True

    def _end(self, micro: Micro) -> None:
        if self._is_broken:
            self._check_whole()
        if micro.is_skipped:
            self._skipped_average()
        elif not micro.losses:
            self._current = None
            raise WorkloadError(
                f"micro-batch {len(self._ran)} had no window.backward(loss): call it once for "
                "each, or window.skip()"
            )
        self._current = None
        if not self._todo:
            self._training.watch.end()
        self._ran.append(micro)

    def _skipped_average(self) -> None:
        """Take part in the average for which the other ranks wait, without a gradient."""
        ranks, watch = self._training.ranks, self._training.watch
        if ranks.averages(not self._todo):
            watch.before_backward()
            watch.before_move()
            ranks.skip()
            watch.after_backward(averaged=True)

    def _leave(self, micro: Micro) -> None:
        """Note that the loop over micro-batches was left, maybe after its last backward pass."""
        ranks = self._training.ranks
        self._current, self._is_left = None, True
        if ranks.size > 1:
            ranks.give_up(self._left(), in_pass=True)
        elif micro.losses and not self._todo:  # as zip(range(n), window) leaves it
            with contextlib.suppress(WorkloadError):
                self._end(micro)
                self._complete()
                self._is_left = False

    def _left(self) -> WorkloadError:
        return WorkloadError(f"it left window {self._number} before the end of its loop")

    def _complete(self) -> None:
        """Agree on what was skipped when all have run, and weight the gradients accordingly."""
        ranks = self._training.ranks
        skipped = [m for m in self._ran if m.is_skipped and not m.repeats]
        if ranks.size == 1 and not skipped:
            self._is_whole = True
            return
        weight, samples = ranks.sums(
            math.fsum(micro.weight for micro in skipped), sum(m.piece.samples for m in skipped)
        )
        self._is_whole = True
        if not samples:
            return
        self._skipped_samples, rest = int(samples), self.weight - weight
        self._scale = self.weight / rest if rest > 0 else 0.0
        for parameter in self._training.update.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(self._scale)

    def _drop(self) -> None:
        """End the window without an update."""
        self._training.update.zero()
        self._is_left = False
        self.stepped = self.skipped = True
        self._training.ranks.end_window()
        self._finish(self._shortages, self._smallest)

    def _total(self) -> Tensor:
        """Return this rank's part of the window's loss."""
        by_factor: dict[float, list[Tensor]] = {}
        for micro in self._ran:
            for loss, factor in micro.losses:
                by_factor.setdefault(factor, []).append(loss.reshape(()))
        parts = [
            torch.stack(losses).sum() * (factor * self._scale)
            for factor, losses in by_factor.items()
        ]
        if not parts:  # every micro-batch of this rank was skipped
            return torch.zeros(())
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def _pass(self, loss: Callable[[Any], Tensor]) -> bool:
        """Run what is left; return whether the gradients are spoiled and all must run again."""
        while self._todo:
            micro = self._todo.popleft()
            last = not self._todo
            buffers = self._training.rewind.buffers()
            shortage = attempt(partial(self._forward_backward, micro, loss, last))
            if not isinstance(shortage, Shortage):
                continue
            self._current = None
            micro.losses.clear()
            self._note(micro, shortage)
            halves = self._halved(micro)
            free_caches()
            self._todo.extendleft(reversed(halves))
            if self._training.ranks.recover():
                return True
            if self._in_backward:
                self._repeat()
            else:
                self._training.rewind.restore_buffers(buffers)
        return False

    def _forward_backward(self, micro: Micro, loss: Callable[[Any], Tensor], last: bool) -> None:
        ranks = self._training.ranks
        ranks.begin_micro_batch(last)
        try:
            self._current, self._in_backward = micro, False
            batch, tensors = handed(micro.piece.batch)
            before = versions(tensors)
            try:
                value = loss(batch)
                if micro.losses:
                    raise WorkloadError(
                        "the function given to window.run called window.backward: let it return "
                        "the loss, run calls it"
                    )
                if not micro.is_skipped:
                    assert self._mark is not None
                    self._training.rewind.search(checked_loss(value), self._mark)
                    self.backward(value)
            finally:
                micro.wrote = versions(tensors) != before
            self._end(micro)
        finally:
            ranks.end_micro_batch()

    def _repeat(self) -> None:
        """Go back to the window's beginning, to run the micro-batches that ran once more."""
        if any(micro.wrote for micro in self._ran):
            raise DoesNotFitError(
                "a micro-batch ran out of memory, and those before it cannot run again: the loss "
                "function writes to their tensors in place; let it write to copies"
            )
        assert self._mark is not None
        self._training.rewind.restore(self._mark)
        self._rewound()

    def _rewound(self) -> None:
        """Drop the gradients, and put the micro-batches that ran before those that did not."""
        self._training.update.zero()
        for micro in self._ran:
            micro.losses.clear()
            micro.is_skipped = False
        self._is_whole, self._is_broken = False, False
        self._scale, self._skipped_samples = 1.0, 0
        self._todo.extendleft(reversed(self._ran))
        self._ran.clear()
        self._begin_gradients()

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
        if micro.wrote:
            raise DoesNotFitError(
                f"a micro-batch of {samples} ran out of memory ({shortage}) and cannot run again: "
                "the loss function writes to its tensors in place; let it write to copies"
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
