"""What the ranks of a training run agree on, and when their gradients are averaged.

Invariant: every rank makes the same collective calls in the same order, whatever happens on one of
them; a rank that cannot go on says so in the next call instead of leaving the others waiting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autobatch.errors import UsageError
from autobatch.support.ranks import ranks_here
from autobatch.workload.wrappers import is_data_parallel

__all__ = ["Ranks", "Sync", "Tally", "group_of", "ranks_of"]

Sync = Literal["last", "each"]


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
    """

    size = 1
    alike = False
    recovers = True

    def total(self, own: Tally) -> Tally:
        """Add up what the ranks have drawn; waits for the device."""
        return own

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank; waits for the device."""
        return flag

    def sum(self, value: Tensor) -> Tensor:
        """Add up a scalar over the ranks, without waiting for the device."""
        return value

    def syncing(self, last: bool, *, watched: bool) -> contextlib.AbstractContextManager[None]:
        """Run one micro-batch, averaging gradients if it is the last of the window.

        `watched` prepares for `leave`.
        """
        return contextlib.nullcontext()

    def leave(self, *, in_backward: bool) -> bool:
        """Go on after a micro-batch that was cut short before or in its backward pass.

        Returns whether the gradients of the other ranks are spoiled, so that all of them have to
        repeat the window.
        """
        return False


class _Group(Ranks):
    """The collective calls that every kind of training run shares."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.size = dist.get_world_size(group)
        on_cards = "nccl" in str(dist.get_backend(group))
        self._device = torch.device("cuda" if on_cards else "cpu")

    def total(self, own: Tally) -> Tally:
        values = [own.weight, own.samples, own.micro_batches, own.can_go_on]
        mine = torch.tensor(values, dtype=torch.float64, device=self._device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=self._group)
        weights, samples, counts, able = torch.stack(every).T.tolist()
        return Tally(
            weight=sum(weights),
            samples=int(sum(samples)),
            micro_batches=int(max(counts)),
            can_go_on=all(able),
        )

    def any(self, flag: bool) -> bool:
        raised = torch.tensor(float(flag), device=self._device)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group)
        return bool(raised.item())

    def sum(self, value: Tensor) -> Tensor:
        value = value.to(self._device)
        dist.all_reduce(value, group=self._group)
        return value


class Replicas(_Group):
    """DistributedDataParallel: gradients are averaged in the backward pass of the last micro-batch.

    `no_sync` covers the forward pass, too: DDP decides there whether the backward pass averages.
    """

    def __init__(self, model: Any, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        self._model = model
        # with either option DDP decides by itself which parameters a backward pass reaches
        self.recovers = not (model.find_unused_parameters or model.static_graph)
        self._averages = False
        # whether DDP's forward pass has begun and ended in the current micro-batch
        self._entered = self._left = False
        self._reached: set[nn.Parameter] = set()

    @contextlib.contextmanager
    def syncing(self, last: bool, *, watched: bool) -> Iterator[None]:
        """Run one micro-batch, with or without DDP's averaging."""
        self._averages = last
        with contextlib.ExitStack() as stack:
            for hook in self._watch() if watched else ():
                stack.enter_context(hook)
            if not last:
                stack.enter_context(self._model.no_sync())
            yield

    def _watch(self) -> list[Any]:
        """Register hooks that note how far a micro-batch gets."""
        self._entered = self._left = False
        self._reached.clear()

        def entered(*_: Any) -> None:
            self._entered = True

        def left(*_: Any) -> None:
            self._left = True

        watched = self._parameters() if self._averages else ()
        return [
            self._model.register_forward_pre_hook(entered),
            self._model.register_forward_hook(left),
            *(p.register_post_accumulate_grad_hook(self._reached.add) for p in watched),
        ]

    def _parameters(self) -> list[nn.Parameter]:
        ignored = self._model.parameters_to_ignore
        named = self._model.module.named_parameters()
        return [p for name, p in named if p.requires_grad and name not in ignored]

    def leave(self, *, in_backward: bool) -> bool:
        """Go on after a micro-batch that was cut short before or in its backward pass.

        After the forward pass of the last micro-batch, DDP on all ranks waits for a backward pass
        that averages every bucket. Gradients that are missing are therefore sent as zeros, by a
        backward pass through their parameters alone.
        """
        if not self._averages or not (self._left or in_backward):
            if self._entered:  # DDP has synchronised the buffers, which it does once a window
                self._model.require_forward_param_sync = False
            return False
        missing = [p for p in self._parameters() if p not in self._reached]
        if missing:
            nothing = torch.stack([p.flatten()[:1].sum().float() * 0 for p in missing]).sum()
            nothing.backward()
        return True


class Shards(_Group):
    """FSDP2: gradients are reduced to the ranks' shards in the last micro-batch, or in each.

    Without reduction every rank keeps whole gradients between micro-batches
    (`FSDPModule.set_requires_gradient_sync`).
    """

    # FSDP2 all-gathers parameters in every forward pass, so all ranks must run the same number of
    # micro-batches, and none can recover alone.
    alike = True
    recovers = False

    def __init__(self, modules: list[Any], group: dist.ProcessGroup | None, sync: Sync) -> None:
        super().__init__(group)
        self._modules = modules
        self._sync = sync

    @contextlib.contextmanager
    def syncing(self, last: bool, *, watched: bool) -> Iterator[None]:
        """Run one micro-batch, with or without reduction."""
        self._set(last or self._sync == "each")
        try:
            yield
        finally:
            self._set(True)

    def _set(self, reduces: bool) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(reduces, recurse=False)


def group_of(model: nn.Module | None, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the ranks with different samples: those given, or DDP's own; None for all."""
    whole: Any = getattr(model, "_orig_mod", model)
    if group is None and whole is not None and is_data_parallel(whole):
        group = whole.process_group
    return group


def ranks_of(
    model: nn.Module | None, *, group: dist.ProcessGroup | None = None, sync: Sync | None = None
) -> Ranks:
    """Return how the ranks of this process's run work together.

    Args:
        model: as it is called in training, wrapped or sharded.
        group: the ranks with different samples; None takes DDP's own, or all.
        sync: when FSDP2 reduces gradients; None is "last".

    Raises:
        UsageError: several ranks, and the model is unknown or does not average its gradients.
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
        return Replicas(whole, group)
    sharded = _sharded_modules(whole)
    if sharded:
        return Shards(sharded, group, sync or "last")
    raise UsageError(
        f"{ranks} ranks train together, and {type(whole).__name__} averages no gradients: wrap it "
        "in DistributedDataParallel, or apply fully_shard to it"
    )


def _sharded_modules(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
