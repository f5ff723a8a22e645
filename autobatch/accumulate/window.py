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
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from autobatch.accumulate.agreement import At, Tally
from autobatch.accumulate.batches import handed
from autobatch.accumulate.micro import Micro, Training
from autobatch.accumulate.retry import Shortages
from autobatch.accumulate.rewind import Mark
from autobatch.accumulate.update import free_caches
from autobatch.accumulate.watch import versions
from autobatch.errors import AutobatchWarning, DoesNotFitError, UsageError, WorkloadError
from autobatch.support.oom import Shortage, attempt
from autobatch.workload.loss import checked_loss

__all__ = ["Window"]

State = Literal["new", "running", "left", "whole", "stepped"]
"""How far a window is: "left" before its end, "whole" once all micro-batches ran on all ranks."""


class Window:
    """One training window: its micro-batches, then one update.

    Either iterate over it, calling `backward` once for each micro-batch, or call `run`, which also
    recovers from a lack of memory; then call `step`. What touches the gradients or the parameters
    of the optimizers in between is an error, as the update would not be that of the window.

    Attributes:
        samples: samples of the window over all ranks: the effective batch, or less at the loader's
            end or where micro-batches were skipped.
        weight: sum of their weights; the samples themselves where no weight was given.
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
        self.grad_norm: Tensor | None = None
        self.skipped = False
        self._training = training
        self._number = number
        self._finish = finish
        self._todo = deque(micros)
        self._ran: list[Micro] = []
        self._current: Micro | None = None
        self._state: State = "new"
        self._mark: Mark | None = None
        self._in_backward = False
        self._is_broken = False  # a backward pass began and did not end
        self._shortages = Shortages(training, total.samples, number=number, largest=largest)
        self._loss: Tensor | None = None
        self._skipped_samples = 0
        self._scale = 1.0  # what gradients were multiplied by, where micro-batches were skipped

    @property
    def stepped(self) -> bool:
        """Whether the window is done, by `step` or without an update."""
        return self._state == "stepped"

    @property
    def has_run(self) -> bool:
        """Whether all micro-batches have run, or the window will have no update."""
        return self._state in ("whole", "stepped")

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
        while self._todo:
            micro = self._todo.popleft()
            try:
                with self._running(micro) as batch:
                    yield batch
            except GeneratorExit:
                self._leave(micro)
                raise
            except Exception as error:
                self._training.ranks.give_up(error, in_pass=True)
                raise
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
            self._current, self._state = None, "left"
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
            training.check_unscaled(loss, micro, len(self._todo) + 1)
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
            if self._state != "whole":
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
        if self._state != "whole":
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
        if self._state != "whole":
            left = len(self._todo) + (self._current is not None or self._state == "left")
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
        self._end_window()

    def _begin(self) -> None:
        """Begin the window's gradients, unless a part of its micro-batches ran."""
        if self._state in ("left", "stepped") or (not self._todo and self._ran):
            raise WorkloadError(
                "the micro-batches of this window have run: window.again() gives them once more, "
                "with the gradients of the first time dropped"
            )
        if self._current is not None:
            raise WorkloadError("the micro-batches of this window are running")
        if self._state == "new":
            self._begin_gradients()

    def _begin_gradients(self) -> None:
        self._state, self._is_broken = "running", False
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
            self._training.watch.end(self._training.update.parameters)
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
        self._current, self._state = None, "left"
        if ranks.size > 1:
            ranks.give_up(self._left(), in_pass=True)
        elif micro.losses and not self._todo:  # as zip(range(n), window) leaves it
            with contextlib.suppress(WorkloadError):
                self._end(micro)
                self._complete()

    def _left(self) -> WorkloadError:
        return WorkloadError(f"it left window {self._number} before the end of its loop")

    def _complete(self) -> None:
        """Agree on what was skipped when all have run, and weight the gradients accordingly."""
        ranks = self._training.ranks
        if len(self._ran) > 1:
            self._training.watch.note_hooks()
        skipped = [m for m in self._ran if m.is_skipped and not m.repeats]
        if ranks.size == 1 and not skipped:
            self._state = "whole"
            return
        weight, samples = ranks.sums(
            math.fsum(micro.weight for micro in skipped), sum(m.piece.samples for m in skipped)
        )
        self._state = "whole"
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
        self.skipped = True
        self._end_window()

    def _end_window(self) -> None:
        self._state = "stepped"
        self._training.ranks.end_window()
        self._finish(self._shortages.count, self._shortages.smallest)

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
            buffers = self._training.rewind.buffers()
            shortage = attempt(partial(self._forward_backward, micro, loss))
            if not isinstance(shortage, Shortage):
                continue
            self._current = None
            micro.losses.clear()
            halves = self._shortages.halves(micro, shortage)
            free_caches()
            self._todo.extendleft(reversed(halves))
            if self._training.ranks.recover():
                return True
            if self._in_backward:
                self._repeat()
            else:
                self._training.rewind.restore_buffers(buffers)
        return False

    def _forward_backward(self, micro: Micro, loss: Callable[[Any], Tensor]) -> None:
        with self._running(micro) as batch:
            value = loss(batch)
            if micro.losses:
                raise WorkloadError(
                    "the function given to window.run called window.backward: let it return the "
                    "loss, run calls it"
                )
            if not micro.is_skipped:
                assert self._mark is not None
                self._training.rewind.search(checked_loss(value), self._mark)
                self.backward(value)

    @contextlib.contextmanager
    def _running(self, micro: Micro) -> Iterator[Any]:
        """Make a micro-batch the current one, hand out its batch, and end it; not after an error.

        Whether its tensors were written to is noted, and what the ranks changed for it is put back,
        on every exit.
        """
        ranks = self._training.ranks
        try:
            ranks.begin_micro_batch(not self._todo)
            self._current, self._in_backward = micro, False
            batch, tensors = handed(micro.piece.batch)
            before = versions(tensors)
            try:
                yield batch
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
        self._scale, self._skipped_samples = 1.0, 0
        self._todo.extendleft(reversed(self._ran))
        self._ran.clear()
        self._begin_gradients()
