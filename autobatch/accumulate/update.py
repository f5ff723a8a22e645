"""The optimizers' update: unscale, clip, step, schedule, zero, once a window and in this order.

Invariant: an update that ran out of memory has either not happened or happened once, and one whose
gradients are not finite has not happened to any of the optimizers.
"""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import Parameter
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.accumulate.watch import versions
from autobatch.accumulate.written import Written
from autobatch.errors import AutobatchWarning, DoesNotFitError, UsageError, WorkloadError
from autobatch.support.oom import Shortage, attempt
from autobatch.support.torch_private import found_infinite
from autobatch.workload.optimizers import innermost, needs_closure, parameters_of
from autobatch.workload.step_calls import calls_hooks

__all__ = ["Updater", "free_caches"]


class Updater:
    """Clips, steps and zeroes.

    Args:
        optimizers: stepped in this order.
        schedulers: stepped after them, once an update.
        clip_norm: 2-norm over all parameters that gradients are clipped to, after unscaling.
        scaler: a `torch.amp.GradScaler` for fp16.
        guarded: keep a copy of all that optimizers write in host memory during each update.
            Otherwise that is done only where memory is scarce, or an update has run out of it
            before.

    Attributes:
        is_open: whether a window's gradients are being added up, or wait for their update.

    Raises:
        UsageError: a scheduler's step needs an argument, or an optimizer's a function that computes
            the loss.
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
            _check_scheduler(scheduler)
        for optimizer in optimizers:
            if needs_closure(optimizer):
                raise UsageError(
                    f"{type(optimizer).__name__} computes the loss again from inside of its step, "
                    "where a window has done its update: split the batch yourself, in the closure "
                    "that you pass to step, into micro-batches of plan.micro_batch"
                )
        self.optimizers = tuple(optimizers)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._schedulers = tuple(schedulers)
        self._clip_norm = clip_norm
        self._guarded = guarded
        self._written: Written | None = None
        self._hooked: set[int] = set()  # optimizers whose steps are noticed
        self._stepped: set[int] = set()
        self._listed: list[Tensor] = []  # by the groups, where one may be in several
        self._parameters: list[Tensor] = []
        self.is_open = False

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimizers train; the same list as long as that does not change."""
        groups = [group["params"] for o in self.optimizers for group in o.param_groups]
        listed = list(chain.from_iterable(groups))
        if len(listed) != len(self._listed) or not all(map(is_, listed, self._listed)):
            self._listed = listed  # by identity: code replaces parameters in the groups' own lists
            self._parameters = list(parameters_of(self.optimizers))
        return self._parameters

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Refuse steps of the optimizers that are not the window's own, while windows run."""

        def refuse(optimizer: Any, *_: Any) -> None:
            self._stepped.add(id(optimizer))
            if self.is_open:
                raise WorkloadError(
                    "optimizer.step() was called while a window adds up its gradients: leave the "
                    "update to window.step(), once after `for batch in window`"
                )

        with ExitStack() as stack:
            for optimizer in map(innermost, self.optimizers):
                if calls_hooks(optimizer):
                    stack.enter_context(optimizer.register_step_pre_hook(refuse))
                    self._hooked.add(id(optimizer))
            try:
                yield
            finally:
                self.is_open = False
                self._hooked.clear()

    def zero(self) -> None:
        """Drop the gradients; the window ends."""
        self.is_open = False
        for optimizer in self.optimizers:
            if type(optimizer).zero_grad is torch.optim.Optimizer.zero_grad:
                continue  # what that does to each parameter is done below, in a quarter of the time
            optimizer.zero_grad()
        for parameter in self.parameters:
            parameter.grad = None

    def __call__(self, any_rank: Callable[[bool], bool]) -> tuple[Tensor | None, bool]:
        """Update the parameters from their gradients, then drop the gradients.

        Nothing is updated or clipped, and schedulers are not stepped, where the scaler finds a
        gradient that is not finite.

        Args:
            any_rank: says whether a flag is set on any rank.

        Returns:
            The whole norm before clipping (None without clipping), and whether the scaler skipped
            the update.

        Raises:
            DoesNotFitError: memory ran out, and again when the update was repeated; the message
                says whether the parameters are as they were.
        """
        skipped, norm = False, None
        if self.scaler is not None:
            skipped = any_rank(self._unscale(self.scaler))
        if not skipped:
            norm = self._clip()
            self._step()
            for scheduler in self._schedulers:
                scheduler.step()
        if self.scaler is not None:
            self.scaler.update()
        self.zero()
        return norm, skipped

    def _unscale(self, scaler: torch.amp.GradScaler) -> bool:
        """Unscale all gradients; return whether one of them is not finite."""
        for optimizer in self.optimizers:
            self._on_gradients(partial(_unscaled, scaler, optimizer), "unscaling")
        return any(found_infinite(scaler, optimizer) for optimizer in self.optimizers)

    def _clip(self) -> Tensor | None:
        if self._clip_norm is None:
            return None
        clip = partial(nn.utils.clip_grad_norm_, self.parameters, self._clip_norm)
        norm: Tensor = self._on_gradients(clip, "clipping")
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _on_gradients(self, work: Callable[[], Any], name: str) -> Any:
        """Do what changes gradients, again where it ran out of memory before it changed one."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        before = versions(gradients)
        found = attempt(work)
        if isinstance(found, Shortage) and versions(gradients) == before:
            free_caches()
            _warn(f"{name} the gradients ran out of memory ({found}): it is repeated")
            found = attempt(work)
        if isinstance(found, Shortage):
            raise DoesNotFitError(
                f"{name} the gradients ran out of memory: {found}; parameters and optimizer state "
                "are as they were; make more headroom"
            )
        return found

    def _step(self) -> None:
        is_copied = self._guarded or self._is_scarce()
        if is_copied or self._written is None:
            self._written = Written(self.optimizers, copied=is_copied)
        else:
            self._written = self._written.renewed()
        shortage = attempt(self._step_all)
        if not isinstance(shortage, Shortage):
            self._written = None if is_copied else self._written
            return
        self._take_back(self._written, shortage)
        free_caches()
        _warn(
            f"the optimizer's update ran out of memory ({shortage}): it is repeated parameter by "
            "parameter, and from now on what it changes is copied to host memory before"
        )
        self._guarded = True
        before, self._written = Written(self.optimizers, copied=True), None
        with _one_by_one(self.optimizers):
            shortage = attempt(self._step_all)
        if isinstance(shortage, Shortage):
            self._take_back(before, shortage)
            raise DoesNotFitError(
                f"the optimizer's update ran out of memory twice: {shortage}; parameters and "
                "optimizer state are as they were; make more headroom, or use an optimizer with "
                "less state"
            )

    def _is_scarce(self) -> bool:
        """Return whether an update may run out of memory.

        Adam-like optimizers create two tensors per parameter in their first update, and their
        foreach versions need one more during each update. Other optimizers need less.
        """
        first = next((p for p in self.parameters if p.requires_grad), None)
        if first is None or not first.is_cuda:
            return False
        trained = sum(p.nbytes for p in self.parameters if p.requires_grad)
        need = trained * (1 if any(map(_has_state, self.optimizers)) else 3)
        free, _ = torch.cuda.mem_get_info(first.device)
        reserved = torch.cuda.memory_reserved(first.device)
        return free + reserved - torch.cuda.memory_allocated(first.device) < need

    def _step_all(self) -> None:
        self.is_open = False
        self._stepped.clear()
        try:
            for optimizer in self.optimizers:
                optimizer.step()
        finally:
            self.is_open = True
        for optimizer in self.optimizers:
            one = id(innermost(optimizer))
            skipped = getattr(optimizer, "step_was_skipped", False)  # by a scaler of accelerate's
            if one in self._hooked - self._stepped and not skipped:
                raise WorkloadError(
                    f"the step of {type(optimizer).__name__} did nothing: take accelerate's "
                    "accumulate() away from around the windows, and prepare with "
                    "gradient_accumulation_steps=1"
                )

    def _take_back(self, before: Written, shortage: Shortage) -> None:
        """Undo an update that was cut short.

        Raises:
            DoesNotFitError: it changed something, or may have, and there is no copy.
        """
        if not before.can_restore:
            what = (
                "with some parameters updated and others not"
                if before.changed
                else "and it is not known which parameters were updated, as this optimizer is not "
                "PyTorch's own"
            )
            raise DoesNotFitError(
                f"the optimizer's update was cut short by a lack of memory ({shortage}), {what}: "
                "go back to the last checkpoint, and pass guard_update=True to be able to take "
                "such an update back"
            )
        before.restore()


def _check_scheduler(scheduler: Any) -> None:
    """Check that a scheduler can be stepped without arguments, before a parameter is updated.

    Raises:
        UsageError: it cannot.
    """
    name, step = type(scheduler).__name__, getattr(scheduler, "step", None)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UsageError(
            "ReduceLROnPlateau follows a metric: call its step(metric) yourself, once an "
            "evaluation, and leave it out here"
        )
    if not callable(step):
        raise UsageError(
            f"scheduler= holds {name}, which has no step(): pass learning-rate schedulers such as "
            "those of torch.optim.lr_scheduler"
        )
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):  # code in C, or a wrapper that does not tell
        return
    needed = [p.name for p in parameters if p.kind in _NAMED and p.default is Parameter.empty]
    if needed:
        call = f"step({', '.join(needed)})"
        raise UsageError(
            f"{name}.{call} needs what windows do not know: call it yourself, after window.step() "
            "or once an epoch, and leave the scheduler out here"
        )
    if any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
        wrapped = getattr(scheduler, "scheduler", None)  # accelerate's passes on what it is given
        if wrapped is not None:
            _check_scheduler(wrapped)


_NAMED = {Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY}


def _unscaled(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Unscale the gradients of an optimizer, unless the user did, to clip them himself."""
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise


def _has_state(optimizer: Any) -> bool:
    return bool(innermost(optimizer).state)


def _warn(text: str) -> None:
    warnings.warn(text, AutobatchWarning, stacklevel=6)


@contextmanager
def _one_by_one(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Let optimizers update one parameter after the other, which needs the least memory."""
    every = [group for optimizer in optimizers for group in optimizer.param_groups]
    groups = [g for g in every if "foreach" in g and not g.get("fused")]
    kept = [group["foreach"] for group in groups]
    for group in groups:
        group["foreach"] = False
    try:
        yield
    finally:
        for group, foreach in zip(groups, kept, strict=True):
            group["foreach"] = foreach


def free_caches() -> None:
    """Give cached blocks back to the device, so that other sizes can be allocated.

    Objects that hold each other are collected first: they keep what a failed attempt allocated.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
