"""Ranks whose gradients DistributedDataParallel averages.

Invariant: in a window every rank rebuilds DDP's buckets, if they have to be, when it begins,
synchronises buffers once, before its first forward pass, and averages gradients once, in its last
micro-batch; before any further average the ranks agree on it. So a rank that gives up knows for
what the others wait.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autobatch.accumulate.agreement import At, Group
from autobatch.accumulate.watch import Watch
from autobatch.errors import UsageError, WorkloadError
from autobatch.support.torch_private import (
    check_reduced,
    finish_learning,
    has_begun_learning,
    rebuild_buckets,
    replicated_count,
    without_hooks,
)

__all__ = ["Replicas", "check_averaged"]

_NAMES_SHOWN = 3


class Replicas(Group):
    """DistributedDataParallel: gradients are averaged in the backward pass of the last micro-batch.

    What `no_sync` does covers the forward pass, too: DDP decides there whether the backward pass
    averages. With `static_graph`, DDP learns its graph in a backward pass that averages, so that
    those of the first window all do; averaging sums of which a part is averaged already gives the
    same.
    """

    def __init__(self, model: Any, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        self._model = model
        # with either option DDP decides by itself which parameters a backward pass reaches
        self.recovers = self.skips = not (model.find_unused_parameters or model.static_graph)
        self._learns = self.alike = self._has_to_learn = bool(model.static_graph)
        # averages until which it is known that DDP averages as it learned to
        self._unproved = 2 * self._learns
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
        self._is_open = False  # whether a window has begun and not ended
        self._has_entered = False  # whether a forward pass of DDP has, in this window
        self._averages = False  # whether this micro-batch does
        self._is_prepared = False  # a forward pass of DDP waits for the backward pass that averages
        self._reached: set[nn.Parameter] = set()  # what that has come to
        self._is_done = False  # whether this window's average is
        self._syncs = True
        self._hooks: list[Any] = []

    @property
    def averaged(self) -> list[nn.Parameter]:
        """The parameters whose gradients DDP averages, if they require them."""
        return self._averaged

    @contextlib.contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """Notice DDP's forward passes."""
        # gradients that are views of buckets move where DDP rebuilds these, after the first average
        moves = self._model.gradient_as_bucket_view
        self._is_open = False

        def entered(*_: Any) -> None:
            self._enter()
            if moves:
                watch.before_move()

        def left(*_: Any) -> None:
            if torch.is_grad_enabled() and self._model.require_backward_grad_sync:
                self._is_prepared = True
                self._reached.clear()
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

    def _enter(self) -> None:
        """Note that DDP's forward pass begins, and agree on one of which others may not know.

        That is one after the window's average, which prepares another, and one between windows that
        synchronises buffers.
        """
        if not self._is_open:
            if self._model.will_sync_module_buffers():
                self.any(False, At.BETWEEN)
            return
        self._synchronise_once()
        if torch.is_grad_enabled() and self._is_averaged():
            self.any(False, At.AVERAGE)
            self._is_done = self._is_prepared = self._has_to_learn = False

    def _synchronise_once(self) -> None:
        if self._has_entered:
            self._model.require_forward_param_sync = False
        self._has_entered = True

    def averages(self, last: bool) -> bool:
        """See `Ranks.averages`."""
        return last or self._learns

    def begin_micro_batch(self, last: bool) -> None:
        """See `Ranks.begin_micro_batch`."""
        self._averages = self.averages(last)
        self._syncs = self._model.require_backward_grad_sync
        if self._averages:
            self._hooks = [
                parameter.register_post_accumulate_grad_hook(self._reached.add)
                for parameter in self._parameters()
            ]
        else:
            self._model.require_backward_grad_sync = False

    def end_micro_batch(self) -> None:
        """See `Ranks.end_micro_batch`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._model.require_backward_grad_sync = self._syncs

    def begin_window(self, trained: list[Tensor]) -> None:
        """See `Ranks.begin_window`."""
        self._is_prepared = self._is_done = False
        asked = [p.requires_grad for p in trained]
        if trained is not self._trained or asked != self._asked:
            self._trained, self._asked = trained, asked
            check_averaged(trained, self._model, averaged=self._averaged)

    def open_window(self) -> None:
        """Note that all ranks have a window, and do what only some forward passes of theirs would.

        An evaluation by one rank would change which of them synchronise, and in which order.
        """
        self._is_open, self._has_entered = True, False
        self._is_prepared = self._is_done = False
        self._model.require_forward_param_sync = True
        rebuild_buckets(self._model)

    def before_average(self) -> None:
        """See `Ranks.before_average`."""
        if not self._model.require_backward_grad_sync:
            raise WorkloadError(
                "this backward pass would not be averaged over the ranks: take no_sync() away from "
                "around the windows, which use it themselves"
            )
        if not self._is_prepared:
            raise WorkloadError(
                "this backward pass would not be averaged over the ranks, because no forward pass "
                "of the DistributedDataParallel module came before it: call that module and not "
                "its .module, and add up the losses of several forward passes before one backward"
            )

    def after_average(self) -> None:
        """See `Ranks.after_average`."""
        try:
            check_reduced(self._model)
        except RuntimeError as error:
            raise WorkloadError(
                "this backward pass did not reach all parameters that DistributedDataParallel "
                "averages, so that their gradients are those of this rank alone: give it "
                "find_unused_parameters=True, or let every micro-batch reach all of them"
            ) from error
        self._is_done, self._is_prepared, self._has_to_learn = True, False, False
        if self._unproved:
            self._unproved -= 1
            self._check_alike()

    def _check_alike(self) -> None:
        """Check that gradients are the same on all ranks, which costs a wait for the device."""
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        own = sum(float(gradient.norm()) for gradient in gradients)
        every = [row[0] for row in self._agree(At.LEARNED, own)]
        if not all(math.isclose(one, own, rel_tol=1e-6) or one != one for one in every):
            raise WorkloadError(
                "DistributedDataParallel with static_graph does not average this model's gradients "
                "over the ranks, as it learned another graph: run no backward pass past its "
                "wrapper before, or leave static_graph out"
            )

    def _is_averaged(self) -> bool:
        """Whether the average for which the others wait has run, by whichever backward pass."""
        if self._is_done or not (self._is_prepared and self._reached):
            return self._is_done
        if self._has_to_learn and not has_begun_learning(self._model):
            return False
        if not self._model.find_unused_parameters:
            return self._reached.issuperset(self._parameters())
        with contextlib.suppress(RuntimeError):
            check_reduced(self._model)
            return True
        return False

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self._averaged if p.requires_grad]

    def end_window(self) -> None:
        """See `Ranks.end_window`."""
        self._learns = self.alike = False
        self._is_open = False

    def skip(self) -> None:
        """See `Ranks.skip`."""
        if self._averages and not self._is_averaged():
            self._average_zeros()

    def recover(self) -> bool:
        """Go on after a micro-batch that was cut short before or in its backward pass.

        After the forward pass of the last micro-batch, DDP on all ranks waits for a backward pass
        that averages every bucket. Gradients that are missing are therefore sent as zeros, by a
        backward pass through their parameters alone.
        """
        if not self._averages:
            return False
        if not self._is_averaged():
            if not self._is_prepared:
                return False
            self._average_zeros()
        return True

    def _complete(self) -> None:
        if not self._is_averaged():
            # hooks of parameters may be what failed; where this fails too, the others have to know
            with contextlib.suppress(Exception), without_hooks(self._parameters()):
                self._average_zeros()
            self._is_done = True

    def _average_zeros(self) -> None:
        """Run the backward pass for which the other ranks wait, with zeros for what is missing.

        Where DDP's own forward pass has not prepared it, that runs around a module which only
        touches the parameters.
        """
        begun = self._reached if self._is_prepared else set()
        missing = [p for p in self._parameters() if p not in begun]
        decides = self._model.find_unused_parameters  # in a forward pass, what it waits for
        with torch.enable_grad():
            if self._has_to_learn and has_begun_learning(self._model):
                finish_learning(self._model)
            elif begun and decides:
                for parameter in missing:
                    with contextlib.suppress(RuntimeError):  # it does not wait for this one
                        _zero_of([parameter]).backward()
            elif self._is_prepared and not (decides or self._has_to_learn):
                if missing:
                    _zero_of(missing).backward()
            elif missing:
                self._forward_zeros(missing).backward()
        self._is_done, self._is_prepared = True, False

    def _forward_zeros(self, parameters: list[nn.Parameter]) -> Tensor:
        model, module = self._model, self._model.module
        self._synchronise_once()
        syncs, model.require_backward_grad_sync = model.require_backward_grad_sync, True
        model.module = _Zeros(module, parameters)
        try:
            # past the hooks of modules; DDP moves inputs, and expects one
            zero: Tensor = model.forward(parameters[0].detach())
            return zero
        finally:
            model.module = module
            model.require_backward_grad_sync = syncs


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


def check_averaged(
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
