"""The optimizer's update: clip, step, schedule, zero, once a window and in this order.

Invariant: an update that ran out of memory has either not happened or happened once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.errors import AutobatchWarning, DoesNotFitError, UsageError
from autobatch.support.oom import Shortage, attempt
from autobatch.workload.optimizers import needs_closure

__all__ = ["Updater", "free_caches"]


class Updater:
    """Clips, steps and zeroes.

    Args:
        optimizers: stepped in this order.
        schedulers: stepped after them, once an update.
        clip_norm: 2-norm over all parameters that gradients are clipped to, after unscaling.
        scaler: a `torch.amp.GradScaler` for fp16.
        guarded: keep a copy of parameters and state in host memory during each update. Otherwise
            that is done only where memory is scarce, or an update has run out of it before.

    Raises:
        UsageError: a scheduler needs a metric, or an optimizer a function that computes the loss.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        schedulers: Sequence[Any] = (),
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        guarded: bool = False,
    ) -> None:
        for scheduler in schedulers:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                raise UsageError(
                    "ReduceLROnPlateau follows a metric: call its step(metric) yourself, once an "
                    "evaluation, and leave it out here"
                )
        for optimizer in optimizers:
            if needs_closure(optimizer):
                raise UsageError(
                    f"{type(optimizer).__name__} computes the loss again from inside of its step, "
                    "and a window gives its micro-batches once: split the batch yourself, in the "
                    "closure that you pass to step, into micro-batches of plan.micro_batch"
                )
        self.optimizers = tuple(optimizers)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._schedulers = tuple(schedulers)
        self._clip_norm = clip_norm
        self._guarded = guarded

    def zero(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> tuple[Tensor | None, bool]:
        """Update the parameters from their gradients, then drop the gradients.

        Schedulers are not stepped where the scaler skipped the update.

        Returns:
            The norm before clipping (None without clipping), and whether the scaler skipped it.

        Raises:
            DoesNotFitError: memory ran out, and again when the update was repeated; the message
                says whether the parameters are as they were.
        """
        norm = self._clip()
        scale = self.scaler.get_scale() if self.scaler else 1.0
        for optimizer in self.optimizers:
            self._step(optimizer)
        skipped = False
        if self.scaler:
            self.scaler.update()
            skipped = self.scaler.get_scale() < scale
        if not skipped:
            for scheduler in self._schedulers:
                scheduler.step()
        self.zero()
        return norm, skipped

    def _clip(self) -> Tensor | None:
        if self._clip_norm is None:
            return None
        if self.scaler:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        parameters = list(chain.from_iterable(map(_parameters, self.optimizers)))
        return nn.utils.clip_grad_norm_(parameters, self._clip_norm)

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        step: Callable[[], Any] = (
            partial(self.scaler.step, optimizer) if self.scaler else optimizer.step
        )
        before = _Before(optimizer, copied=self._guarded or _is_scarce(optimizer))
        shortage = attempt(step)
        if not isinstance(shortage, Shortage):
            return
        before.restore(shortage)
        free_caches()
        warnings.warn(
            f"the optimizer's update ran out of memory ({shortage}): it is repeated parameter by "
            "parameter, and from now on what it changes is copied to host memory before",
            AutobatchWarning,
            stacklevel=4,
        )
        self._guarded = True
        before = _Before(optimizer, copied=True)
        with _one_by_one(optimizer):
            shortage = attempt(step)
        if isinstance(shortage, Shortage):
            before.restore(shortage)
            raise DoesNotFitError(
                f"the optimizer's update ran out of memory twice: {shortage}; parameters and "
                "optimizer state are as they were; make more headroom, or use an optimizer with "
                "less state"
            )


class _Before:
    """Parameters and optimizer state before an update.

    Tensors count their in-place changes (`Tensor._version`), so that an update which ran out of
    memory before it changed anything is recognised without a copy.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, copied: bool) -> None:
        self._optimizer = optimizer
        self._state = {parameter: dict(state) for parameter, state in optimizer.state.items()}
        entries = chain.from_iterable(state.values() for state in self._state.values())
        tensors = [t for t in chain(_parameters(optimizer), entries) if isinstance(t, Tensor)]
        self._versions = [(tensor, tensor._version) for tensor in tensors]
        self._copies = [t.detach().to("cpu", copy=True) for t in tensors] if copied else None

    def restore(self, shortage: Shortage) -> None:
        """Undo an update that was cut short.

        Raises:
            DoesNotFitError: parameters or state changed, and there is no copy of them.
        """
        changed = [at for at, (t, version) in enumerate(self._versions) if t._version != version]
        if changed and self._copies is None:
            raise DoesNotFitError(
                f"the optimizer's update was cut short by a lack of memory ({shortage}), with "
                "some parameters updated and others not: go back to the last checkpoint, and "
                "pass guard_update=True to be able to take such an update back"
            )
        with torch.no_grad():
            for at in changed:
                assert self._copies is not None
                self._versions[at][0].copy_(self._copies[at])
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)


@contextmanager
def _one_by_one(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let an optimizer update one parameter after the other, which needs the least memory."""
    groups = [g for g in optimizer.param_groups if "foreach" in g and not g.get("fused")]
    kept = [group["foreach"] for group in groups]
    for group in groups:
        group["foreach"] = False
    try:
        yield
    finally:
        for group, foreach in zip(groups, kept, strict=True):
            group["foreach"] = foreach


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def _is_scarce(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an update may run out of memory.

    Adam-like optimizers create two tensors per parameter in their first update, and their foreach
    versions need one more during each update. Other optimizers need less.
    """
    parameters = [p for p in _parameters(optimizer) if p.is_cuda and p.grad is not None]
    if not parameters:
        return False
    device = parameters[0].device
    tensors = 1 if optimizer.state else 3
    need = tensors * sum(p.numel() * p.element_size() for p in parameters)
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached < need


def free_caches() -> None:
    """Give cached blocks back to the device, so that other sizes can be allocated."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
