"""Plain records of what a probe found: trials, curve, timeline, facts of the model.

Invariant: every figure says how it is known (`Evidence`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from autobatch.records.footprint import Evidence

__all__ = [
    "MemoryPoint",
    "ModelFacts",
    "SpeedPoint",
    "Timeline",
    "TimelineSegment",
    "Trial",
    "WindowMemory",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Two consecutive training windows that were executed, on a GPU or on the virtual one.

    `seconds` is wall time of the whole trial on the machine that ran it, `window_seconds` the
    median time of a window after warm-up on the GPU, and `window_range` that of the fastest and of
    the slowest; None where it was simulated.
    """

    micro_batch: int
    accumulation_steps: int
    fits: bool
    oom: bool
    alloc_retries: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    seconds: float
    evidence: Evidence
    window_seconds: float | None = None
    window_range: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPoint:
    """One point of the memory curve: peaks at one micro-batch, without the context."""

    micro_batch: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedPoint:
    """How long one update of the whole target takes at one split of it.

    Attributes:
        micro_batch: samples in each forward/backward.
        accumulation_steps: micro-batches of the window.
        window_seconds: the median of the windows that were timed after a warm-up, or an estimate
            by a roofline over every operator.
        low, high: the fastest and slowest of those windows, or the estimate's range.
        how: "measured" on the GPU, or an "estimate".
    """

    micro_batch: int
    accumulation_steps: int
    window_seconds: float
    low: float
    high: float
    how: Literal["measured", "estimate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowMemory:
    """Bytes by category at the peak of a training window other than the planned one.

    Attributes:
        micro_batch: samples in each forward/backward.
        accumulation_steps: micro-batches in the window.
        categories: bytes by category, names as in `Footprint.categories`; they sum to the peak.
        peak_allocated_bytes: most bytes of live blocks at once.
    """

    micro_batch: int
    accumulation_steps: int
    categories: Mapping[str, int]
    peak_allocated_bytes: int
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineSegment:
    """Bytes alive over part of the traced windows, for the memory-over-time chart.

    Attributes:
        event: index of the trace event at which these figures hold.
        categories: live requested bytes by category, names as in `Footprint.categories`.
        allocated_bytes, reserved_bytes: as the caching allocator counts them.
    """

    event: int
    categories: Mapping[str, int]
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The traced windows, thinned for drawing; the peak's sample is always kept."""

    samples: tuple[TimelineSegment, ...]
    marks: tuple[tuple[int, str, int, int], ...]  # (event, phase, window, micro_batch)
    peak_event: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts of the model and its training that a report shows.

    Attributes:
        name: class name of the module.
        parameters: number of elements of all parameters; `trainable_parameters` of those with grad.
        batchnorm_layers: modules whose statistics depend on the micro-batch.
        optimizer: class name of the optimizer that was probed.
        loss: how the loss was obtained: "user", "output.loss", "mean of output.loss",
            "scalar output", "cross entropy" or "surrogate sum".
        autocast: "bf16", "fp16" or None.
        clip_norm: the gradient norm clipped to, or None.
        frozen: the outermost modules that have parameters of which none learns.
        loss_code: the expression of `model` and `batch` whose value was the loss; None where a
            function of the user's gave it, and where nothing did.
    """

    name: str
    parameters: int
    trainable_parameters: int
    batchnorm_layers: int
    optimizer: str
    loss: str
    autocast: str | None
    clip_norm: float | None
    frozen: tuple[str, ...]
    loss_code: str | None
