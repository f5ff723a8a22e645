"""`check_equivalence`: compares the gradient of a window of micro-batches with its batch's.

Invariant: the user's model, its modes, the loss and the random state are as before.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autobatch.devices.preserve import one_at_a_time, process_state_preserved
from autobatch.devices.session import user_errors
from autobatch.equivalence.compared_windows import choose_windows
from autobatch.equivalence.gradients import Weigh
from autobatch.equivalence.investigation import TOLERANCES, Investigation
from autobatch.equivalence.result import Equivalence
from autobatch.equivalence.subject import Subject, one_batch
from autobatch.errors import UsageError, WorkloadError
from autobatch.records.plan_record import PlanRecord
from autobatch.support.exits import exits_reported
from autobatch.support.host_memory import free_host_bytes
from autobatch.support.interrupts import arriving, held
from autobatch.support.units import format_bytes
from autobatch.support.wording import argument, for_reader, passing
from autobatch.workload.complete import Asked
from autobatch.workload.sample import BatchDims
from autobatch.workload.workload import Loss, Workload

__all__ = ["check_equivalence"]


@arriving()
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
    autocast: str | None = None,
    dtype: torch.dtype | None = None,
    samples: int = 16,
) -> Equivalence:
    """Compare the gradient of a window of micro-batches with that of the same samples at once.

    Runs on copies on the CPU. Where the gradients differ, one possible cause after the other is
    removed and the gradients are compared again, until only rounding is left. A window of unequal
    micro-batches is always compared as well, because equal ones may hide a wrong weight. Parameters
    that are all zero get small values instead, because zeros hide the layers before them until the
    first update.

    Args:
        model: the module to train, on any device (`meta` gets random weights), or a Workload.
        sample: one batch, a Dataset or a DataLoader, as in `tune`; inferred if None. Give one as
            in training: if your sequences are padded, with padding.
        plan: its window is compared; a smaller one where it has more than `samples` samples.
        micro_batch: samples of each micro-batch, instead of a plan's; 4 if None.
        accumulation_steps: micro-batches of a window, instead of a plan's; 2 if None.
        batch_dims: which dimension of the sample is the batch; as in `tune`.
        loss: `loss(model, batch)` gives a scalar; as in `tune`.
        weight: `weight(micro_batch)` is the weight of its loss in the window, such as its number of
            tokens; the number of samples if None.
        autocast: "bf16" or "fp16" shows the rounding of mixed precision; None compares exactly.
        dtype: of parameters, inputs and arithmetic; float64 if None, or float32 where the model
            cannot run in float64.
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
    if isinstance(model, Workload) and loss is not None:
        model = replace(model, window=None)
    window = _asked_window(plan, micro_batch, accumulation_steps)
    sample = one_batch(sample, samples if plan is not None else sum(window))
    asked = Asked(model=model, sample=sample, batch_dims=batch_dims, loss=loss)
    with one_at_a_time(), exits_reported("the model"):
        workload = asked.workload()
    if workload.window is not None:
        raise UsageError(
            "a Workload with a window function computes its own gradients: to check the loss by "
            f"itself, {passing('loss', 'lambda model, batch: …')}{for_reader('', ' and no window')}"
        )
    workload = replace(workload, autocast=autocast)
    precise = torch.float64 if autocast is None else torch.float32
    types = (dtype,) if dtype else tuple(dict.fromkeys((precise, torch.float32)))
    notes: list[str] = []
    with process_state_preserved(), held(), torch.compiler.set_stance("force_eager"):
        for each in types:
            is_last = each is types[-1]
            try:
                _require_memory(workload, each, len(window) if plan is None else 4)
                torch.set_default_dtype(each)
                subject = Subject(workload=workload, dtype=each)
                limit = samples if plan is not None else None
                with user_errors(workload, max(window)):
                    compared = choose_windows(subject, window, limit)
                    result = Investigation(subject=subject, weight=weight).result(compared)
            except WorkloadError as error:
                if is_last:
                    raise
                notes.append(f"float64 was not possible ({error}): compared in float32")
            else:
                break
    return replace(result, notes=(*notes, *result.notes), seconds=time.perf_counter() - started)


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


def _require_memory(workload: Workload, dtype: torch.dtype, steps: int) -> None:
    """Check that the parameters and the gradients of batch and micro-batches fit into host memory.

    Raises:
        WorkloadError: they do not.
    """
    elements = sum(parameter.numel() for parameter in workload.model.parameters())
    needed = elements * dtype.itemsize * (4 + steps)
    free = free_host_bytes()
    if free is not None and needed > free:
        raise WorkloadError(
            f"comparing {elements:,} parameters takes {format_bytes(needed)} of host memory in "
            f"{dtype}, and {format_bytes(free)} are free: check a smaller configuration of "
            "the same model"
        )
