"""`check_equivalence`: compares the gradient of a window of micro-batches with its batch's.

Invariant: model, modes, data set, loss and weight of the user and the random state are as before.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from autobatch.devices.preserve import answering, one_at_a_time, process_state_preserved
from autobatch.devices.session import user_errors
from autobatch.equivalence.compared_windows import choose_windows
from autobatch.equivalence.experiment import Ablation, Experiment
from autobatch.equivalence.gradients import TOLERANCES, Weigh
from autobatch.equivalence.investigation import Investigation
from autobatch.equivalence.own_window import OwnWindow
from autobatch.equivalence.result import Equivalence
from autobatch.equivalence.subject import Subject, has_batch_norm, one_batch
from autobatch.errors import UsageError, WorkloadError
from autobatch.records.plan_record import PlanRecord
from autobatch.support.exits import exits_reported
from autobatch.support.host_memory import free_host_bytes
from autobatch.support.interrupts import held
from autobatch.support.units import format_bytes
from autobatch.support.wording import argument, count, for_reader
from autobatch.workload.complete import Asked
from autobatch.workload.kept import attributes_kept
from autobatch.workload.sample import BatchDims
from autobatch.workload.workload import Loss, WindowFunction, Workload

__all__ = ["check_equivalence"]

_LARGE_DIFFERENCE = 1e-2
"""More than float32 rounds, in any model that can be trained in it."""

_GRADIENTS = 7
"""Parameters, the gradients of the batch and of two windows of two parts, and their difference."""


@answering()
def check_equivalence(
    model: nn.Module | Workload,
    sample: Any = None,
    plan: PlanRecord | None = None,
    *,
    micro_batch: int | None = None,
    accumulation_steps: int | None = None,
    batch_dims: BatchDims = None,
    loss: Loss | None = None,
    weight: Weigh | None = None,
    window: WindowFunction | None = None,
    autocast: str | None = None,
    dtype: torch.dtype | None = None,
    samples: int = 16,
) -> Equivalence:
    """Compare the gradient of a window of micro-batches with that of the same samples at once.

    Runs on copies on the CPU. Each micro-batch gets its rows of the random numbers that the batch
    drew. Where the gradients differ, one possible cause after the other is removed and the
    gradients are compared again, until only rounding is left. A window of unequal micro-batches is
    always compared as well, because equal ones may hide a wrong weight; the loss is tried on
    batches in which one sample has fewer labels, masked entries or boxes than the others, and the
    model on batches in which one sample is longer than the others.
    Parameters that are all zero get small values instead, because zeros hide the layers before them
    until the first update.

    Args:
        model: the module to train, on any device (`meta` gets random weights), or a Workload.
        sample: one batch, a Dataset or a DataLoader, as in `tune`; inferred if None. Give one as
            in training: if your sequences are padded, with padding.
        plan: its window is compared; a smaller one where it has more than `samples` samples.
        micro_batch: samples of each micro-batch, instead of a plan's; 4 if None. Of models with
            more than a million parameters five samples are compared, in micro-batches of 3 and 2.
        accumulation_steps: micro-batches of a window, instead of a plan's; 2 if None.
        batch_dims: which dimension of the sample is the batch; as in `tune`.
        loss: `loss(model, batch)` gives a scalar; as in `tune`. Parameters that it has are compared
            too.
        weight: `weight(micro_batch)` is the weight of its loss in the window, such as its number of
            tokens; the number of samples if None.
        window: `window(model, optimizer, batches)` is a loop of your own that runs one window and
            steps once, as in `Workload`; the gradient at its step is compared with that of `loss`
            on the whole batch or, where no loss is given, of the window given the whole batch.
        autocast: "bf16" or "fp16" also shows the rounding of mixed precision; the verdict is that
            of exact arithmetic.
        dtype: of parameters, inputs and arithmetic; float64 if None, or float32 where the model
            cannot run in float64, or where a large difference in float32 says enough.
        samples: the most samples of a plan's window to compare.

    Raises:
        UsageError: an argument cannot be understood; the subclass says which kind.
        WorkloadError: the model or loss failed, or gives no gradient to compare.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> loss = lambda model, batch: model(batch).square().mean()
    >>> check_equivalence(net, torch.randn(16, 4), loss=loss).equivalent
    True
    """
    started = time.perf_counter()
    if plan is not None and (micro_batch, accumulation_steps) != (None, None):
        sizes = f"{argument('micro_batch')} and {argument('accumulation_steps')}"
        raise UsageError(f"give {for_reader('a plan', '--plan')}, or {sizes}, not both")
    if dtype is not None and dtype not in TOLERANCES:
        raise UsageError(f"dtype is {dtype}: use torch.float64, torch.float32 or None")
    if isinstance(model, Workload):
        window = window or (model.window if loss is None else None)
        model = replace(model, window=None)
    if window is not None and weight is not None:
        raise UsageError("a window function weights its micro-batches itself: give it or a weight")
    sizes_asked = _asked_window(plan, micro_batch, accumulation_steps)
    sample, lost = one_batch(sample, samples if plan is not None else sum(sizes_asked))
    asked = Asked(model=model, sample=sample, batch_dims=batch_dims, loss=loss, autocast=autocast)
    with one_at_a_time(), exits_reported("the model"):
        workload = asked.workload()
    if workload.changes:
        raise UsageError(
            f"the Workload has {count(len(workload.changes), 'change')} of its model, which a "
            "comparison leaves out: apply them to the model, and leave `changes` empty"
        )
    check = _Check(
        workload=workload,
        window=sizes_asked,
        limit=samples if plan is not None else None,
        weight=weight,
        own=window,
    )
    with (
        attributes_kept(weight),
        process_state_preserved(),
        held(),
        torch.compiler.set_stance("force_eager"),
    ):
        result = check.result(dtype)
    notes = (*lost, *workload.notes, *result.notes)
    return replace(result, notes=notes, seconds=time.perf_counter() - started)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Check:
    """What was asked for.

    Attributes:
        workload: the model, its batches and its loss.
        window: sizes of the micro-batches.
        limit: the most samples to compare; all if None.
        weight: of a micro-batch; its number of samples if None.
        own: a loop of the user's own in place of the usual one.
    """

    workload: Workload
    window: tuple[int, ...]
    limit: int | None
    weight: Weigh | None
    own: WindowFunction | None

    def result(self, dtype: torch.dtype | None) -> Equivalence:
        """Compare in the type that was asked for, or in those that the model can run in."""
        if dtype is not None:
            return self._with_rounding(self._compared(dtype))
        if self.own is None and has_batch_norm(self.workload.model):
            quick = self._quickly()
            if quick is not None:
                return self._with_rounding(quick)
        try:
            return self._with_rounding(self._compared(torch.float64))
        except WorkloadError as error:
            result = self._compared(torch.float32)
            note = f"float64 was not possible ({error}): compared in float32"
            return self._with_rounding(replace(result, notes=(note, *result.notes)))

    def _quickly(self) -> Equivalence | None:
        """Compare a large model in float32, where a difference that is large says enough.

        Returns:
            None if the model is small, or the difference is, or float32 fails or explains too
            little, as where BatchNorm makes its rounding large.
        """
        try:
            with self._subject(torch.float32) as subject:
                compared = choose_windows(subject, self.window, self.limit)
                if not compared.is_large:
                    return None
                investigation = Investigation(subject=subject, weight=self.weight)
                result = investigation.result(compared, only_above=_LARGE_DIFFERENCE)
        except WorkloadError:
            return None
        kinds = {culprit.kind for culprit in result.culprits} if result is not None else set()
        return None if kinds & {"undecided", "unexplained"} else result

    def _compared(self, dtype: torch.dtype) -> Equivalence:
        with self._subject(dtype) as subject:
            compared = choose_windows(subject, self.window, self.limit)
            if self.own is not None:
                own = OwnWindow(subject=subject, function=self.own, tolerance=TOLERANCES[dtype])
                return own.result(compared)
            is_dear = compared.is_large and dtype == torch.float64
            light = replace(subject, dtype=torch.float32) if is_dear else None
            investigation = Investigation(subject=subject, weight=self.weight, light=light)
            result = investigation.result(compared)
            assert result is not None
            return result

    def _with_rounding(self, result: Equivalence) -> Equivalence:
        """Add how far the window is off in mixed precision, where that was asked for."""
        autocast = self.workload.autocast
        if autocast is None or self.own is not None:
            return result
        with self._subject(torch.float32, autocast) as subject:
            window, rows = choose_windows(subject, self.window, self.limit).windows[-1]
            mixed = Experiment(subject=subject, rows=rows, window=window, weight=self.weight)
            apart = mixed.measured(Ablation()).apart(mixed.shares())
        return replace(result, rounding=apart)

    @contextmanager
    def _subject(self, dtype: torch.dtype, autocast: str | None = None) -> Iterator[Subject]:
        """Yield the model in a type, inside of which the user's errors are put into one line."""
        _require_memory(self.workload, dtype)
        torch.set_default_dtype(dtype)
        with user_errors(self.workload, max(self.window)):
            yield Subject(workload=self.workload, dtype=dtype, autocast=autocast)


def _asked_window(
    plan: PlanRecord | None, micro_batch: int | None, accumulation_steps: int | None
) -> tuple[int, ...]:
    if plan is not None:
        return max(plan.split.windows, key=sum)
    size = 4 if micro_batch is None else micro_batch
    steps = 2 if accumulation_steps is None else accumulation_steps
    for name, value in (("micro_batch", size), ("accumulation_steps", steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{argument(name)} is {value!r}: use a whole number of at least 1")
    return (size,) * steps


def _require_memory(workload: Workload, dtype: torch.dtype) -> None:
    """Check that the parameters, and the gradients of the batch and its parts, fit into memory.

    Raises:
        WorkloadError: they do not.
    """
    elements = sum(parameter.numel() for parameter in workload.model.parameters())
    needed = elements * dtype.itemsize * _GRADIENTS
    free = free_host_bytes()
    if free is not None and needed > free:
        raise WorkloadError(
            f"comparing {elements:,} parameters takes {format_bytes(needed)} of host memory in "
            f"{dtype}, and {format_bytes(free)} are free: check a smaller configuration of "
            "the same model"
        )
