"""The loop that users write, on the bench: what PyTorch's own CUDA code allocates in it.

Invariant: nothing of autobatch runs here but the inputs and the loss that it inferred, and what
reads PyTorch's memory history.

Kernels do nothing on the bench, so code that branches on a value reads garbage. Where models of
transformers ask whether positions are those of one sequence, and whether a mask of ones that they
made leaves nothing out, they are told that it is so, as on a card.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map

from autobatch.devices.cuda.memory_history import HistoryRecorder
from autobatch.devices.cuda.runtime import CudaRuntime
from autobatch.memory.trace import Trace
from autobatch.workload.loss import DefaultLoss
from autobatch.workload.workload import AUTOCAST_DTYPES
from reports.fidelity.rows import WINDOWS, Row
from reports.fidelity.subjects import workload


@dataclass(frozen=True, slots=True)
class Truth:
    """What a run took: PyTorch's own counters, and its trace with the op of each allocation.

    Attributes:
        values_read: how often ops that read values of tensors ran, but for the optimizer's, by op.
            Kernels of the bench compute none, so what depends on those values is not the truth.
    """

    allocated_bytes: int
    reserved_bytes: int
    trace: Trace
    values_read: Mapping[str, int]


def train(row: Row, *, labelled: bool = True) -> Truth:
    """Run the windows of a row on the card.

    Args:
        row: its model is built here; the card is the process's.
        labelled: whether each allocation is given its op, by PyTorch's profiler.

    Raises:
        NotBuiltError: there is no such model here.
        torch.OutOfMemoryError: the card is too small.
    """
    what = workload(row.model, checkpointing=row.checkpointing)
    model, loss_of = what.model, what.loss or DefaultLoss()
    _tell_true_values()
    runtime = CudaRuntime(0)
    recorder = HistoryRecorder(runtime)
    with recorder.recording():
        model.cuda().train()
        optimizer = torch.optim.AdamW(model.parameters())
        with profile(activities=[ProfilerActivity.CPU] * labelled) as profiled:
            for window in range(WINDOWS):
                for step in range(row.accumulation_steps):
                    recorder.begin("inputs", window, step)
                    batch = tree_map(_on_card, what.batch(row.micro_batch))
                    recorder.begin("forward", window, step)
                    with torch.autocast(
                        "cuda",
                        AUTOCAST_DTYPES.get(row.autocast or "", torch.bfloat16),
                        enabled=row.autocast is not None,
                    ):
                        loss = loss_of(model, batch)
                    loss = loss / row.accumulation_steps
                    recorder.begin("backward", window, step)
                    loss.backward()
                recorder.begin("step", window, row.accumulation_steps - 1)
                optimizer.step()
                optimizer.zero_grad()
        torch.cuda.synchronize()
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        events = torch.cuda.memory._snapshot()["device_traces"][0]
    trace = recorder.trace(row.micro_batch, row.accumulation_steps)
    if not labelled:
        return Truth(allocated, reserved, trace, {})
    spans = _spans(profiled)
    return Truth(allocated, reserved, _labelled(trace, events, spans), _values_read(spans))


_ASKS_OF_MASKS = (
    "find_packed_sequence_indices",
    "_ignore_causal_mask_sdpa",
    "_ignore_bidirectional_mask_sdpa",
)
"""What models of transformers ask: whether sequences are packed, and whether tokens are masked."""


def _tell_true_values() -> None:
    """Let models of transformers find what a card would: whole sequences, and none masked."""
    masking = sys.modules.get("transformers.masking_utils")
    for name in _ASKS_OF_MASKS:
        if (ask := getattr(masking, name, None)) is not None:
            setattr(masking, name, partial(_told, ask))


def _told(ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _AllTrue():
        found = ask(*args, **kwargs)
        return bool(found) if isinstance(found, torch.Tensor) and not found.dim() else found


class _AllTrue(TorchFunctionMode):
    """Lets every tensor that is asked for its truth be true."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        return True if func is torch.Tensor.__bool__ else found


def _on_card(value: Any) -> Any:
    return value.cuda() if isinstance(value, torch.Tensor) else value


_Span = tuple[int, int, str]
"""When an op began and ended, and its name."""


def _spans(profiled: profile) -> list[_Span]:
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    return sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in profiled.profiler.kineto_results.events()
    )


_READ_VALUES = frozenset(
    f"aten::{name}"
    for name in ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive")
)
_OPTIMIZER = "Optimizer.step#"


def _values_read(spans: Sequence[_Span]) -> dict[str, int]:
    """Count the ops that read values; optimizers read counters that they keep on the CPU."""
    steps = [(begin, end) for begin, end, name in spans if name.startswith(_OPTIMIZER)]
    return Counter(
        name
        for begin, _, name in spans
        if name in _READ_VALUES and not any(first <= begin <= last for first, last in steps)
    )


def _labelled(trace: Trace, events: Sequence[dict[str, Any]], spans: Sequence[_Span]) -> Trace:
    """Give every block the innermost op that ran as it was allocated, by the clock."""
    begins = [begin for begin, _, _ in spans]
    times = [event["time_us"] * 1000 for event in events if event["action"] == "alloc"]
    blocks = [
        replace(block, op=_op_at(time, spans, begins))
        for block, time in zip(trace.blocks, times, strict=True)
    ]
    return replace(trace, blocks=tuple(blocks))


_DEPTH = 24
_PLAIN = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::resize_", "[memory]")


def _op_at(time: int, spans: Sequence[_Span], begins: Sequence[int]) -> str:
    """Return the innermost op at an instant, leaving out those that only allocate."""
    place = bisect_right(begins, time + 999)  # the history knows microseconds
    for _, end, name in reversed(spans[max(place - _DEPTH, 0) : place]):
        if end >= time and name not in _PLAIN:
            return name
    return ""
