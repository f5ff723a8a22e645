"""What the ranks of a training run agree on, and when their gradients are averaged.

Invariant: every rank makes the same collective calls in the same order, whatever happens on one of
them. Each call carries a status: a rank that cannot go on completes what the others wait for, says
so in its next call, and all of them end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autobatch.accumulate.watch import Watch
from autobatch.errors import UsageError, WorkloadError
from autobatch.support.ranks import ranks_here
from autobatch.support.torch_private import (
    check_reduced,
    drop_unreduced,
    replicated_count,
    shard_groups,
    without_hooks,
)
from autobatch.workload.wrappers import is_data_parallel

__all__ = ["Ranks", "Sync", "Tally", "group_of", "ranks_of"]

Sync = Literal["last", "each"]

_NAMES_SHOWN = 3


class OtherRankError(WorkloadError):
    """Another rank cannot go on, and has said so: there is no one to be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What one rank has drawn for a window, or what all have drawn together.

    Attributes:
        weight, samples: sums over the ranks.
        micro_batches: the most that one rank has.
        can_go_on: whether every rank has samples, or had some that it can repeat with weight 0.
    """

    weight: float
    samples: int
    micro_batches: int
    can_go_on: bool


class Ranks:
    """The processes that train one model on different samples; as it stands, a single process.

    Attributes:
        size: how many there are; gradients are averaged over them.
        alike: whether all have to run the same number of micro-batches.
        recovers: whether an OOM on one of them can be recovered.
        skips: whether one of them can leave out a micro-batch.
        shows_gradients: whether gradients are seen in `.grad` after every micro-batch.
    """

    size = 1
    alike = False
    recovers = True
    skips = True
    shows_gradients = True

    def total(self, own: Tally) -> Tally:
        """Add up what the ranks have drawn."""
        return own

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return flag

    def sums(self, *values: float) -> tuple[float, ...]:
        """Add up numbers over the ranks."""
        return values

    def sum(self, value: Tensor) -> Tensor:
        """Add up a scalar over the ranks, without waiting for the device."""
        return value

    def give_up(self, error: BaseException, *, in_pass: bool) -> None:
        """Tell the other ranks that this one cannot go on, and why.

        `in_pass` says that gradients of the current window are not averaged yet, for which the
        others wait. Nothing is said of an error that came from another rank.
        """

    def watching(self, watch: Watch) -> contextlib.AbstractContextManager[None]:
        """Notice forward passes that prepare an average, for as long as windows are iterated.

        `watch` is told where they move gradients.
        """
        return contextlib.nullcontext()

    def averages(self, last: bool) -> bool:
        """Return whether a micro-batch's backward pass averages gradients."""
        return False

    def syncing(self, last: bool, *, watched: bool) -> contextlib.AbstractContextManager[None]:
        """Run one micro-batch, averaging gradients if it is the last of the window.

        `watched` prepares for `leave`.
        """
        return contextlib.nullcontext()

    def begin_window(self, trained: list[Tensor]) -> None:
        """Check what is averaged, and drop gradients that wait to be, outside of `.grad`.

        Raises:
            UsageError: gradients of trained parameters are not averaged, or by something else.
        """

    def before_average(self) -> None:
        """Check that the backward pass that begins now averages, where it has to.

        Raises:
            WorkloadError: it does not, so that the ranks' parameters would drift apart.
        """

    def after_average(self) -> None:
        """Check that the backward pass that just ended has averaged everything.

        Raises:
            WorkloadError: it has not.
        """

    def skip(self) -> None:
        """Take part in the average of a micro-batch without a backward pass of its own."""

    def leave(self, *, in_backward: bool) -> bool:
        """Go on after a micro-batch that was cut short before or in its backward pass.

        Returns whether the gradients of the other ranks are spoiled, so that all of them have to
        repeat the window.
        """
        return False

    def end_window(self) -> None:
        """Note that a window's update is done."""


class _Group(Ranks):
    """The collective calls that every kind of training run shares."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.size = dist.get_world_size(group)
        self._control, self._device = _control_group(group or dist.group.WORLD)
        on_cards = "nccl" in str(dist.get_backend_config(group))
        self._loss_device = torch.device("cuda" if on_cards else "cpu")

    def _exchange(self, *values: float, failure: str = "") -> list[list[float]]:
        """Return the values of every rank, by rank.

        Raises:
            OtherRankError: another rank cannot go on.
        """
        mine = torch.zeros(5, dtype=torch.float64, device=self._device)
        mine[: 1 + len(values)] = torch.tensor([bool(failure), *values], dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=self._control)
        rows: list[list[float]] = torch.stack(every).tolist()
        if any(row[0] for row in rows):
            texts: list[Any] = [None] * self.size
            dist.all_gather_object(texts, failure, group=self._control)
            if not failure:
                rank, text = next((rank, text) for rank, text in enumerate(texts) if text)
                raise OtherRankError(
                    f"rank {rank} cannot go on, so this one ends too; there it was: {text}"
                )
        return [row[1 : 1 + len(values)] for row in rows]

    def total(self, own: Tally) -> Tally:
        rows = self._exchange(own.weight, own.samples, own.micro_batches, own.can_go_on)
        weights, samples, counts, able = zip(*rows, strict=True)
        return Tally(
            weight=sum(weights),
            samples=int(sum(samples)),
            micro_batches=int(max(counts)),
            can_go_on=all(able),
        )

    def any(self, flag: bool) -> bool:
        return any(row[0] for row in self._exchange(flag))

    def sums(self, *values: float) -> tuple[float, ...]:
        return tuple(map(sum, zip(*self._exchange(*values), strict=True)))

    def sum(self, value: Tensor) -> Tensor:
        value = value.to(self._loss_device)
        dist.all_reduce(value, group=self._group)
        return value

    def give_up(self, error: BaseException, *, in_pass: bool) -> None:
        if isinstance(error, OtherRankError):
            return
        try:
            if in_pass:
                self._complete()
        except Exception:  # such as a hook of the user's that fails again; the others have to know
            self._is_done = True
        self._exchange(failure=f"{type(error).__name__}: {error}")

    def _complete(self) -> None:
        """Take part in what the others do with gradients in the current window."""


@cache
def _control_group(group: dist.ProcessGroup) -> tuple[dist.ProcessGroup, torch.device]:
    """Return the group over which ranks agree, on the CPU where that is possible.

    NCCL's own calls wait for everything that runs on the card.
    """
    backends = str(dist.get_backend_config(group))
    if "nccl" not in backends or "gloo" in backends:
        return group, torch.device("cpu")
    if not dist.is_gloo_available():
        return group, torch.device("cuda")
    members = dist.get_process_group_ranks(group)
    made = dist.new_group(members, backend="gloo", use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)  # this rank is one of its members
    return made, torch.device("cpu")


class Replicas(_Group):
    """DistributedDataParallel: gradients are averaged in the backward pass of the last micro-batch.

    `no_sync` covers the forward pass, too: DDP decides there whether the backward pass averages.
    With `static_graph`, DDP learns its graph in a backward pass that averages, so that those of the
    first window all do; averaging sums of which a part is averaged already gives the same.
    """

    def __init__(self, model: Any, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        self._model = model
        # with either option DDP decides by itself which parameters a backward pass reaches
        self.recovers = self.skips = not (model.find_unused_parameters or model.static_graph)
        self._learns = self.alike = bool(model.static_graph)
        # DDP averages what required gradients when it was made
        ignored = model.parameters_to_ignore
        named = model.module.named_parameters()
        self._averaged = [p for name, p in named if p.requires_grad and name not in ignored]
        if len(self._averaged) > (known := replicated_count(model)):
            raise UsageError(
                f"{len(self._averaged)} parameters require gradients, of which "
                f"DistributedDataParallel averages {known}, as it was made before the others did: "
                "unfreeze first, then wrap"
            )
        self._trained: list[Tensor] = []
        self._asked: list[bool] = []
        self._averages = False
        self._is_done = False  # whether this window's average is
        # whether DDP's forward pass has begun and ended since the last backward pass
        self._entered = self._left = False
        self._reached: set[nn.Parameter] = set()

    @contextlib.contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """Notice DDP's forward passes."""
        # gradients that are views of buckets move where DDP rebuilds these, after the first average
        moves = self._model.gradient_as_bucket_view

        def entered(*_: Any) -> None:
            self._entered |= torch.is_grad_enabled()
            if moves:
                watch.before_move()

        def left(*_: Any) -> None:
            self._left |= torch.is_grad_enabled()
            if moves:
                watch.after_move()

        hooks = (
            self._model.register_forward_pre_hook(entered),
            self._model.register_forward_hook(left),
        )
        with contextlib.ExitStack() as stack:
            for hook in hooks:
                stack.enter_context(hook)
            yield

    def averages(self, last: bool) -> bool:
        return last or self._learns

    @contextlib.contextmanager
    def syncing(self, last: bool, *, watched: bool) -> Iterator[None]:
        """Run one micro-batch, with or without DDP's averaging."""
        self._averages = self.averages(last)
        self._entered = self._left = self._is_done = False
        self._reached.clear()
        with contextlib.ExitStack() as stack:
            for parameter in self._parameters() if watched and self._averages else ():
                hook = parameter.register_post_accumulate_grad_hook(self._reached.add)
                stack.enter_context(hook)
            if not self._averages:
                stack.enter_context(self._model.no_sync())
            yield
        self._is_done = last

    def begin_window(self, trained: list[Tensor]) -> None:
        asked = [p.requires_grad for p in trained]
        if trained is not self._trained or asked != self._asked:
            self._trained, self._asked = trained, asked
            _check_averaged(trained, self._model, averaged=self._averaged)

    def after_average(self) -> None:
        try:
            check_reduced(self._model)
        except RuntimeError as error:
            raise WorkloadError(
                "this backward pass did not reach all parameters that DistributedDataParallel "
                "averages, so that their gradients are those of this rank alone: give it "
                "find_unused_parameters=True, or let every micro-batch reach all of them"
            ) from error
        self._is_done = True  # nothing is to be completed, should this rank give up now

    def before_average(self) -> None:
        if not self._model.require_backward_grad_sync:
            raise WorkloadError(
                "this backward pass would not be averaged over the ranks: take no_sync() away from "
                "around the windows, which use it themselves"
            )
        if not self._left:
            raise WorkloadError(
                "this backward pass would not be averaged over the ranks, because no forward pass "
                "of the DistributedDataParallel module came before it: call that module and not "
                "its .module, and add up the losses of several forward passes before one backward"
            )
        self._left = self._is_done = False

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self._averaged if p.requires_grad]

    def end_window(self) -> None:
        self._learns = self.alike = False

    def skip(self) -> None:
        if self._averages:
            self._average_zeros(prepared=self._left)

    def leave(self, *, in_backward: bool) -> bool:
        """Go on after a micro-batch that was cut short before or in its backward pass.

        After the forward pass of the last micro-batch, DDP on all ranks waits for a backward pass
        that averages every bucket. Gradients that are missing are therefore sent as zeros, by a
        backward pass through their parameters alone.
        """
        if not self._averages or not (self._left or in_backward):
            self._note_synchronised()
            return False
        self._average_zeros(prepared=True)
        return True

    def _note_synchronised(self) -> None:
        if self._entered:  # DDP has synchronised the buffers, which it does once a window
            self._model.require_forward_param_sync = False

    def _complete(self) -> None:
        if self._learns or self._is_done:
            return
        prepared = self._averages and self._left
        if not prepared:
            self._note_synchronised()
        with without_hooks(self._parameters()):  # one of them may be what failed
            self._average_zeros(prepared=prepared)
        self._is_done = True

    def _average_zeros(self, *, prepared: bool) -> None:
        """Run the backward pass for which the other ranks wait, with zeros for what is missing.

        Where DDP's own forward pass has not prepared it, that runs around a module which only
        touches the parameters.
        """
        missing = [p for p in self._parameters() if p not in self._reached]
        if not missing:
            return
        if not prepared:
            model, module = self._model, self._model.module
            model.module = _Zeros(module, missing)
            try:
                model(missing[0].detach()).backward()  # DDP moves inputs, and expects one
            finally:
                model.module = module
        else:
            _zero_of(missing).backward()


def _zero_of(parameters: Iterable[Tensor]) -> Tensor:
    """Return a 0 whose gradient is zeros, for every parameter."""
    return torch.stack([p.flatten()[:1].sum().float() * 0 for p in parameters]).sum()


class _Zeros(nn.Module):
    """A stand-in for a module, with its buffers, which DDP synchronises before a forward pass."""

    def __init__(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._of = (module, parameters)  # in a tuple, so that they are no parts of this one

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        return self._of[0].named_buffers(*args, **kwargs)

    def forward(self, _: Tensor) -> Tensor:
        return _zero_of(self._of[1])


class Shards(_Group):
    """FSDP2: gradients are reduced to the ranks' shards in the last micro-batch, or in each.

    Without reduction every rank keeps whole gradients between micro-batches
    (`FSDPModule.set_requires_gradient_sync`), outside of `.grad`.
    """

    # FSDP2 all-gathers parameters in every forward pass, so all ranks must run the same number of
    # micro-batches, and none can recover or skip alone.
    alike = True
    recovers = False
    skips = False

    def __init__(self, modules: list[Any], group: dist.ProcessGroup | None, sync: Sync) -> None:
        super().__init__(group)
        self._modules = modules
        self._groups = [group for m in modules for group in shard_groups(m)]
        self._sync = sync
        self.shows_gradients = sync == "each"

    @contextlib.contextmanager
    def syncing(self, last: bool, *, watched: bool) -> Iterator[None]:
        """Run one micro-batch, with or without reduction."""
        self._reduces = self.averages(last)
        self._set(self._reduces)
        try:
            yield
        finally:
            self._set(True)

    def begin_window(self, trained: list[Tensor]) -> None:
        for group in self._groups:
            if group.gradient_divide_factor is not None:
                raise UsageError(
                    "set_gradient_divide_factor changes by what FSDP2 divides gradients, which a "
                    "window relies on: leave it as it is"
                )
            # what a window that was left, or a backward pass of the user's, did not reduce
            drop_unreduced(group)

    def before_average(self) -> None:
        self._set(True)
        for module in self._modules:
            module.set_is_last_backward(True)

    def averages(self, last: bool) -> bool:
        return last or self._sync == "each"

    def _set(self, reduces: bool) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(reduces, recurse=False)

    def give_up(self, error: BaseException, *, in_pass: bool) -> None:
        # the others wait in the all-gathers of layers, which no rank can complete without them
        if not in_pass:
            super().give_up(error, in_pass=False)


def group_of(model: nn.Module | None, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the ranks with different samples: those given, or DDP's own; None for all."""
    whole: Any = getattr(model, "_orig_mod", model)
    if group is None and whole is not None and is_data_parallel(whole):
        group = whole.process_group
    return group


def ranks_of(
    model: nn.Module | None,
    trained: Iterable[Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    sync: Sync | None = None,
) -> Ranks:
    """Return how the ranks of this process's run work together.

    Args:
        model: as it is called in training, wrapped or sharded.
        trained: the parameters that optimizers hold.
        group: the ranks with different samples; None takes DDP's own, or all.
        sync: when FSDP2 reduces gradients; None is "last".

    Raises:
        UsageError: several ranks, and the model is unknown or does not average its gradients, or
            not those of all trained parameters.
    """
    group = group_of(model, group)
    ranks = ranks_here(group)
    if ranks == 1:
        return Ranks()
    if model is None:
        raise UsageError(
            f"{ranks} ranks train together: pass model=, the module that "
            "DistributedDataParallel or fully_shard gave, so that gradients are averaged once a "
            "window"
        )
    whole: Any = getattr(model, "_orig_mod", model)
    if is_data_parallel(whole):
        replicas = Replicas(whole, group)
        _check_averaged(trained, model, averaged=replicas._averaged)
        return replicas
    sharded = _sharded_modules(whole)
    if sharded:
        _check_averaged(trained, model, averaged=filter(_is_sharded, trained))
        return Shards(sharded, group, sync or "last")
    raise UsageError(
        f"{ranks} ranks train together, and {type(whole).__name__} averages no gradients: wrap it "
        "in DistributedDataParallel, or apply fully_shard to it"
    )


def _check_averaged(
    trained: Iterable[Tensor], model: nn.Module, *, averaged: Iterable[Tensor]
) -> None:
    """Raise a UsageError where the wrapper leaves gradients of trained parameters alone."""
    known = set(map(id, averaged))
    alone = {id(p): p for p in trained if p.requires_grad and id(p) not in known}
    if not alone:
        return
    names = [name for name, p in model.named_parameters() if id(p) in alone]
    shown = ", ".join(names[:_NAMES_SHOWN]) or "none of them in model="
    raise UsageError(
        f"{len(alone)} trained parameters ({shown}{', …' * (len(names) > _NAMES_SHOWN)}) are not "
        "averaged over the ranks, which would drift apart: let DistributedDataParallel or "
        "fully_shard cover them, freeze them, or keep them out of these optimizers"
    )


def _is_sharded(parameter: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _sharded_modules(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
