"""The training windows of a loader, and how they are asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
import torch.distributed as dist
from torch import nn

from autobatch.accumulate.agreement import Tally
from autobatch.accumulate.batches import Count, Cut, Pieces, Position, Reader
from autobatch.accumulate.micro import Backward, Micro, Training, Weight
from autobatch.accumulate.ranks import Sync, group_of, ranks_of
from autobatch.accumulate.reused import Reuse
from autobatch.accumulate.rewind import Rewind
from autobatch.accumulate.update import Updater
from autobatch.accumulate.watch import Watch
from autobatch.accumulate.window import Window
from autobatch.errors import AutobatchWarning, UsageError, WorkloadError
from autobatch.records.plan_record import PlanRecord
from autobatch.support.ranks import ranks_here
from autobatch.support.wording import count
from autobatch.workload.layout import BatchDims, dims_of_text

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["WindowOptions", "Windows", "planned_windows", "windows"]

Reduction = Literal["mean", "sum"]

PATIENCE = 2
"""After this many windows that ran out of memory, the micro-batch is lowered for all later ones."""


class WindowOptions(TypedDict, total=False):
    """What `windows` and `Plan.windows` take by name; `windows` says what each of them does."""

    model: nn.Module | None
    scheduler: Any
    clip_norm: float | None
    scaler: torch.amp.GradScaler | None
    weight: Weight | None
    reduction: Reduction
    batch_dims: BatchDims
    count: Count | None
    cut: Cut | None
    drop_last: bool
    group: dist.ProcessGroup | None
    sync: Sync | None
    retries: int
    guard_update: bool
    backward: Backward | None


class Windows:
    """The training windows of a loader, in any loop of one's own; made by `Plan.windows`.

    Iterating again begins a new epoch. See `windows` for the arguments.

    Attributes:
        sizes: micro-batches of this rank's window, in samples; lowered after repeated
            out-of-memory errors.
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
        backward: Backward | None = None,
    ) -> None:
        if not sizes or any(isinstance(n, bool) or n != int(n) or n < 1 for n in sizes):
            raise UsageError(f"the micro-batches are {sizes!r}: give whole numbers of at least 1")
        self.sizes = tuple(map(int, sizes))
        if reduction not in ("mean", "sum"):
            raise UsageError(f"reduction is {reduction!r}: use 'mean' or 'sum', as the loss does")
        self._loader = loader
        self._reader = Reader(batch_dims=batch_dims, count=count, cut=cut)
        self._reuse = Reuse(loader)
        self._drop_last = drop_last
        if backward is not None:
            _check_backward(backward)
        update = Updater(
            _listed(optimizer),
            schedulers=_listed(scheduler),
            clip_norm=clip_norm,
            scaler=scaler,
            guarded=guard_update,
        )
        trained = update.parameters
        ranks = ranks_of(model, trained, group=group, sync=sync)
        self._training = Training(
            ranks=ranks,
            update=update,
            watch=Watch(shows_gradients=ranks.shows_gradients, moves=backward is not None),
            rewind=Rewind(model, trained),
            weight=weight,
            sums=reduction == "sum",
            retries=retries,
            backward=backward,
        )
        self._position = Position()
        self._done = 0
        self._resumes = False
        self._short = 0
        self._spare: Micro | None = None

    @property
    def samples(self) -> int:
        """Samples of one window on this rank."""
        return sum(self.sizes)

    def __len__(self) -> int:
        """Return the updates of one epoch, or of what is left of it, where the loader tells.

        Raises:
            TypeError: it does not.
        """
        loader: Any = self._loader
        if getattr(loader, "batch_sampler", None) is None or loader.batch_size is None:
            raise TypeError("this loader does not tell its number of samples")
        samples = len(loader) * loader.batch_size if loader.drop_last else len(loader.sampler)
        if self._resumes:
            samples -= self._position.batches * loader.batch_size + self._position.samples
        return samples // self.samples if self._drop_last else math.ceil(samples / self.samples)

    def __iter__(self) -> Iterator[Window]:
        """Yield the windows of one epoch, or of what is left of it after `load_state_dict`.

        Raises:
            WorkloadError: the next window is asked for before `step` of the last one, or another
                rank cannot go on.
            SampleError: a batch of the loader cannot be read or cut.
            UsageError: a rank has no samples at all.
        """
        if not self._resumes:
            self._position, self._done = Position(), 0
        self._resumes = False
        pieces = Pieces(self._loader, self._reader, self._position, self._reuse)
        ranks = self._training.ranks
        ranks.begin()
        with self._training.update.guarding(), ranks.watching(self._training.watch):
            while True:
                try:
                    window = self._next(pieces)
                except Exception as error:
                    ranks.part(f"{type(error).__name__}: {error}", in_pass=False)
                    raise
                if window is None:
                    break
                ranks.open_window()
                try:
                    yield window
                except BaseException:  # GeneratorExit where the loop over windows is left
                    why = f"it left the loop over windows after {self._done} of them"
                    ranks.part(why, in_pass=not window.has_run)
                    raise
                if not window.stepped:
                    left = WorkloadError(
                        f"window {self._done} was left before window.step(): its gradients would "
                        "be lost; window.skip() leaves a window without an update"
                    )
                    ranks.part(f"WorkloadError: {left}", in_pass=not window.has_run)
                    raise left
        self._position, self._done = Position(), 0

    def state_dict(self) -> dict[str, Any]:
        """Return where in the epoch the next window begins, to save beside the optimizer's state.

        Between a window's first micro-batch and its `step`, this is where that window began. A
        `state_dict` of the loader's own is not used: its batches are read and skipped.
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

        Micro-batches stay what they are where the saved ones are larger: a smaller GPU has its own
        plan.

        Raises:
            UsageError: the state is of windows with another number of samples.
        """
        if sum(state["sizes"]) != self.samples:
            raise UsageError(
                f"the saved windows have {sum(state['sizes'])} samples and these {self.samples}: "
                "resume with the same target and number of ranks"
            )
        self.sizes = min(tuple(state["sizes"]), self.sizes, key=max)
        self._position = Position(state["batches"], state["samples"])
        self._done, self._short = state["windows"], state["short"]
        self._resumes = True

    def _next(self, pieces: Pieces) -> Window | None:
        """Draw a window on which all ranks agree; None at the end of the loader."""
        while True:
            drawn = pieces.window(self.sizes)
            if self._drop_last and sum(piece.samples for piece in drawn) < self.samples:
                drawn = []
            micros = [Micro(piece, self._training.weigh(piece)) for piece in drawn]
            # a mean over nothing is NaN, which would spoil the gradients of the others
            micros = [micro for micro in micros if micro.weight]
            self._spare = micros[-1] if micros else self._spare
            total = self._training.ranks.total(
                Tally(
                    weight=sum(micro.weight for micro in micros),
                    samples=sum(piece.samples for piece in drawn),
                    micro_batches=len(micros),
                    can_go_on=bool(micros) or self._can_repeat(),
                )
            )
            if not total.samples:
                self._spare = None
                return None
            if total.weight:
                return Window(
                    self._training,
                    self._in_step(micros, total),
                    total,
                    number=self._done,
                    largest=max(self.sizes),
                    finish=partial(self._finish, pieces.position),
                )
            warnings.warn(
                f"window {self._done} has a weight of 0 over all its "
                f"{count(total.samples, 'sample')}: it is left out",
                AutobatchWarning,
                stacklevel=2,
            )
            self._position = pieces.position

    def _can_repeat(self) -> bool:
        """Whether a micro-batch can run again, for ranks that have more of them."""
        return self._spare is not None and not self._spare.wrote

    def _in_step(self, micros: list[Micro], total: Tally) -> list[Micro]:
        """Add repetitions of weight 0 where other ranks would wait for this one."""
        spare = self._spare
        if spare is None or not total.can_go_on:
            raise UsageError(
                "the loader of a rank has no samples, or none that weigh anything, or it ended "
                "before the others' and the micro-batch that would run again with a weight of 0 "
                "was written to in place: give every rank a part of the data, as "
                "DistributedSampler does, and write to copies"
            )
        needed = total.micro_batches if self._training.ranks.alike else 1
        missing = max(0, needed - len(micros))
        return [*(Micro(spare.piece, 0.0, True) for _ in range(missing)), *micros]

    def _finish(self, position: Position, shortages: int, smallest: int) -> None:
        """Count a window that is done; lower the micro-batch where memory was short repeatedly."""
        self._position = position
        self._done += 1
        self._short = self._short + 1 if shortages else self._short
        if self._short < PATIENCE or smallest >= max(self.sizes):
            return
        steps = math.ceil(self.samples / smallest)
        size, larger = divmod(self.samples, steps)
        before, self.sizes = self.sizes, tuple(size + (at < larger) for at in range(steps))
        self._short = 0
        warnings.warn(
            f"{PATIENCE} windows ran out of memory: the micro-batch is lowered from {max(before)} "
            f"to {max(self.sizes)} for all that follow, with {steps} accumulation steps instead of "
            f"{len(before)}; the effective batch stays {self.samples} samples a rank",
            AutobatchWarning,
            stacklevel=3,
        )


def windows(
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    micro_batch: int,
    accumulation_steps: int,
    **options: Unpack[WindowOptions],
) -> Windows:
    """Return the training windows of a loader from plain numbers; `Plan.windows` from a plan.

    The loader may yield micro-batches, whole effective batches or batches of any other size: each
    window takes exactly micro_batch × accumulation_steps samples on this rank, and the last one
    what is left. The window's gradient is that of the mean over its samples on all ranks. A
    window's micro-batches are drawn before the first of them runs, so that their weights are known:
    let a loader with workers prefetch as many.

    Args:
        loader: an iterable of batches; any structure that `autobatch.batch_builder` reads.
        optimizer: one, or several that are stepped together.
        micro_batch: samples in one forward/backward.
        accumulation_steps: micro-batches between two updates.
        **options:
            model: the module that DistributedDataParallel or fully_shard gave; needed where
                several ranks train together.
            scheduler: one or several learning-rate schedulers, stepped once a window.
            clip_norm: 2-norm that gradients are clipped to (after unscaling), or None.
            scaler: a `torch.amp.GradScaler`; losses are scaled and gradients unscaled with it.
            weight: `weight(batch)` is what the batch's loss is a mean over, such as its number of
                tokens with a label; the default is its number of samples. Micro-batches that weigh
                nothing are left out.
            reduction: "mean", or "sum" where the loss is a sum over what `weight` counts.
            batch_dims: as in `autobatch.batch_builder`.
            count, cut: `count(batch)` and `cut(batch, start, stop)` for batches of other kinds.
            drop_last: leave out a last window with fewer samples.
            group: ranks with different samples; the default is DDP's own, or all.
            sync: when FSDP2 reduces gradients: in the "last" micro-batch, which keeps whole
                gradients on every rank meanwhile, or in "each". DDP averages in the last.
            retries: how many times `Window.run` goes on after a lack of memory in one window.
            guard_update: keep a copy of what the optimizer changes, in host memory, during each
                update, so that it can be taken back in the middle.
            backward: what runs a backward pass in place of `Tensor.backward`, such as
                `fabric.backward`; it is given the loss with its share of the window.

    Raises:
        UsageError: a number is not positive, or several ranks train a model that is not given or
            averages no gradients.

    >>> import torch
    >>> model = torch.nn.Linear(3, 1)
    >>> loader = torch.utils.data.DataLoader(torch.ones(10, 3), batch_size=4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> for window in windows(loader, optimizer, micro_batch=2, accumulation_steps=4):
    ...     for batch in window:
    ...         window.backward(model(batch).square().mean())
    ...     window.step()
    ...     print(window.samples, window.micro_batches)
    8 (2, 2, 2, 2)
    2 (2,)
    """
    if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int):
        raise UsageError(f"accumulation_steps is {accumulation_steps!r}: give a whole number")
    return Windows(loader, optimizer, sizes=(micro_batch,) * accumulation_steps, **options)


def planned_windows(
    plan: PlanRecord,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    **options: Unpack[WindowOptions],
) -> Windows:
    """Return this rank's windows of a plan; see `Plan.windows`.

    Raises:
        UsageError: the plan is for another number of ranks, or as from `windows`.
    """
    group = group_of(options.get("model"), options.get("group"))
    ranks = ranks_here(group)
    if ranks != plan.world_size:
        raise UsageError(
            f"the plan is for {plan.world_size} GPUs and {ranks} train here, which would make the "
            f"effective batch {plan.effective_batch * ranks // plan.world_size} instead of "
            f"{plan.target}: plan with world_size={ranks}"
        )
    chosen: WindowOptions = {
        "clip_norm": plan.model.clip_norm,
        "sync": "each" if plan.is_sharded else None,
        "batch_dims": dims_of_text(plan.batch_dims),
        **options,
    }
    rank = dist.get_rank(group) if ranks > 1 else 0
    return Windows(loader, optimizer, sizes=plan.split.windows[rank], **chosen)


def _check_backward(backward: Backward) -> None:
    """Check that `backward=` does not shrink gradients, as accelerate's does.

    Raises:
        UsageError: it makes them smaller.
    """
    leaf = torch.ones((), requires_grad=True)
    try:
        backward(leaf * 1.0)
    except Exception:  # it takes losses of its own models alone
        return
    given = 0.0 if leaf.grad is None else float(leaf.grad)
    if 0 < given < 1:
        raise UsageError(
            f"the function given as backward= multiplies gradients by {given:g}: prepare it "
            "without gradient accumulation of its own (gradient_accumulation_steps=1)"
        )


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else [value]
