"""An estimate of the seconds of a training window by roofline: what limits each kernel of it.

A kernel takes as long as its FLOPs at the card's peak for their precision, or as its bytes at the
card's bandwidth, whichever is longer, and a constant beside. Kernels come near to those peaks only,
by an efficiency of their kind. Products whose tiles do not fill the multiprocessors evenly come
less near. What the host needs to launch the kernels is laid beside their sum, and the longer of
both counts, since it runs ahead. Collectives of FSDP and DDP run beside the kernels of their pass.

Copies between card and host take their bytes at the bandwidth of the bus. Those of FSDP2, on a
stream of their own, run beside the kernels as well; all others are waited for: `save_on_cpu` copies
on the stream of the kernels. Memory of the host is taken to be pinned; other memory is slower. An
op of the host on what came off the card, as in an update of offloaded state, takes its bytes at the
bandwidth of that memory, which is a lower bound, and the card waits for it.

Every figure from here is an estimate, not a measurement and not a simulation of the hardware. How
far it is off is in `reports/throughput`, whose calibration rows the constants are fitted to.

Williams, Waterman, Patterson: "Roofline", CACM 52 (2009). Tiles and waves: NVIDIA, "Matrix
Multiplication Background User's Guide".
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from autobatch.gpus.catalogue import GpuSpec
from autobatch.gpus.links import Links, links_of
from autobatch.gpus.work import Communication, HostTraffic, Kind, OpWork, WindowWork, Work

__all__ = ["EFFICIENCY", "Bound", "Efficiency", "SpeedEstimate", "can_estimate", "estimate"]

Bound = Literal["compute", "memory", "launch", "communication"]

_FALLBACKS = {"tf32": "fp32", "bf16": "fp32", "fp16": "fp32"}
"""What a card does that lacks a precision: TF32 is then off, and halves are converted."""

_FAMILIES = {(7, 0): "volta", (8, 0): "ampere", (9, 0): "hopper"}
"""By compute capability: families of cards with efficiencies of their own."""

_HALF_RATE = 2.2
"""Tensor cores that are at most so many times as fast as the other cores, as those of GeForce cards
are where they add up in fp32, are kept busy more easily."""

_TILE = 128
"""Rows and columns that one block of a product computes, at most."""

_LEAST_TILE = 16
_DEPTH = 32
"""Depth that a block goes through at a time."""

_SPLIT_DEPTH = 1024
"""Depth from which on a product without enough tiles is split along it as well."""

_TENSOR_CORES = ("fp8", "fp16", "bf16", "tf32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """How near kernels come to a card's peaks, and what they cost beside.

    Attributes:
        compute: share of the peak FLOP/s by kind of op and family of cards: "half-rate" are those
            with slow tensor cores, "" is any other, and "fp32" any where no tensor cores run it.
        memory: share of the peak bandwidth by kind of op.
        waves: idle multiprocessors in the last wave of blocks, as a share of all of them.
        kernel_seconds: between two kernels of a stream, at least.
        call_seconds: that the host takes for a call of an op, with the Python code of modules; no
            row tells of it. An eager Llama of 7 billion makes 25.5 tokens a second on an A100
            (PyTorch's blog, "GPT, Fast", 2023): about 26 microseconds for each of 46 kernels a
            layer. Backward passes call ops from C++, which is faster.
        link: share of the peak bandwidth that collectives, copies and ops of the host reach.
        collective_seconds: of a collective beside its bytes.
        interference: share of the time of collectives that kernels beside them are slowed down by.
        low: least and most seconds that the window takes, as shares of the estimate, four times
            out of five: those of the rows of `reports/throughput` that were not fitted to.
        high: see `low`.
    """

    compute: Mapping[Kind, Mapping[str, float]]
    memory: Mapping[Kind, float]
    waves: float
    kernel_seconds: float
    call_seconds: float
    link: float
    collective_seconds: float
    interference: float
    low: float
    high: float

    def of_compute(self, kind: Kind, family: str) -> float:
        """Return the share of the peak FLOP/s that a kind reaches on a family of cards."""
        shares = self.compute[kind]
        return shares.get(family, shares[""])


EFFICIENCY = Efficiency(
    compute=MappingProxyType(
        {
            "matmul": {"": 0.7, "ampere": 0.69, "half-rate": 0.95, "hopper": 0.56, "fp32": 0.85},
            "convolution": {
                "": 0.5,
                "volta": 0.73,
                "ampere": 0.5,
                "half-rate": 0.95,
                "fp32": 0.78,
            },
            "grouped_convolution": {"": 0.4, "fp32": 0.5},
            "depthwise_convolution": {"": 0.3},
            "recurrent": {"": 0.4},
            "attention": {"": 0.5, "ampere": 0.47, "hopper": 0.35},
            "cudnn_attention": {"": 0.5},
        }
    ),
    memory=MappingProxyType(
        {
            "matmul": 0.8,
            "convolution": 0.73,
            "grouped_convolution": 0.73,
            "depthwise_convolution": 0.17,
            "conversion": 0.88,
            "recurrent": 0.5,
            "attention": 0.7,
            "cudnn_attention": 0.7,
            "norm": 0.75,
            "reduction": 0.75,
            "indexing": 0.5,
            "copy": 0.7,
            "elementwise": 0.85,
            "optimizer": 0.8,
        }
    ),
    waves=0.25,
    kernel_seconds=2e-6,
    call_seconds=20e-6,
    link=0.75,
    collective_seconds=50e-6,
    interference=0.1,
    low=0.88,
    high=1.14,
)
"""The constants that estimates are made with.

Fitted to rows of `reports/throughput`: the shares of products, of convolutions, of attention on an
A100; of memory those of convolutions, conversions, norms and elementwise ops. Those of attention on
an H100 are of the figures of FlashAttention-3 (Shah et al., 2024). The others, links and latencies
are what is usual, and no row tells of them.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedEstimate:
    """The estimated time of a training window: no measurement.

    Attributes:
        seconds: of one window.
        low: that it takes at least, four times out of five.
        high: that it takes at most, four times out of five.
        bound: what most of it goes to: "compute" (FLOP/s), "memory" (bandwidth), "launch" (the host
            cannot keep up) or "communication" (collectives, and what goes through the host).
        samples: that the window trains on one GPU.
        by_op: seconds of its kernels by op, the longest first.
    """

    seconds: float
    low: float
    high: float
    bound: Bound
    samples: int
    by_op: tuple[tuple[str, float], ...]


@dataclass(slots=True)
class _Sum:
    """What parts of a window take together, in seconds."""

    total: float = 0.0
    limits: dict[Bound, float] = field(default_factory=lambda: defaultdict(float))
    by_op: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: _Sum, times: int = 1) -> None:
        self.total += times * other.total
        for limit, seconds in other.limits.items():
            self.limits[limit] += times * seconds
        for op, seconds in other.by_op.items():
            self.by_op[op] += times * seconds


def can_estimate(gpu: GpuSpec) -> bool:
    """Whether a card's bandwidth and FLOP/s are known, without which there is no estimate.

    >>> from autobatch.gpus.catalogue import find_gpu
    >>> can_estimate(find_gpu("a100-40gb")), can_estimate(find_gpu("24GiB"))
    (True, False)
    """
    return gpu.bandwidth_bytes_per_s is not None and "fp32" in gpu.flops


def estimate(
    work: WindowWork,
    gpu: GpuSpec,
    *,
    accumulation_steps: int,
    world_size: int = 1,
    efficiency: Efficiency = EFFICIENCY,
) -> SpeedEstimate | None:
    """Estimate the seconds of a window, whose work was counted, on a card.

    Args:
        work: of the window by its parts, with the communication of one of its ranks. A count holds
            for every card that runs the same kernels.
        gpu: the card.
        accumulation_steps: micro-batches of the window.
        world_size: GPUs that train together; it decides whether they are in one machine.
        efficiency: how near kernels come to the card's peaks.

    Returns:
        The estimate; None where the card's bandwidth or FLOP/s in a precision that the window
        needs are not known, as no figure is made up.

    >>> from autobatch.gpus.catalogue import find_gpu
    >>> from autobatch.gpus.work import OpWork, WindowWork, Work
    >>> product = OpWork(op="mm", kind="matmul", precision="bf16", flops=1e15, bytes=1e9)
    >>> work = WindowWork(
    ...     samples=8, forward=Work.of([product]), backward=Work(), update=Work()
    ... )
    >>> a100 = estimate(work, find_gpu("a100-40gb"), accumulation_steps=1)
    >>> a100.bound, 3 < a100.seconds < 5
    ('compute', True)
    >>> estimate(work, find_gpu("24GiB"), accumulation_steps=1) is None
    True
    """
    if not can_estimate(gpu):
        return None
    card = _Card(gpu, links_of(gpu), world_size, efficiency)
    first = _of_pass(card, work.forward, work.backward)
    last_backward = work.backward
    later = first
    if work.later_forward is not None and work.later_backward is not None:
        later = _of_pass(card, work.later_forward, work.later_backward)
        last_backward = work.later_backward if accumulation_steps > 1 else work.backward
    update = card.part(work.update)
    if first is None or later is None or update is None:
        return None
    window = _Sum()
    window.add(first)
    window.add(later, accumulation_steps - 1)
    window.add(update)
    if work.averages:  # beside the last backward pass
        averaged = card.part(last_backward, (*last_backward.communication, *work.averages))
        alone = card.part(last_backward)
        assert averaged is not None and alone is not None
        window.total += averaged.total - alone.total
        waited = averaged.limits["communication"] - alone.limits["communication"]
        window.limits["communication"] += waited
    return SpeedEstimate(
        seconds=window.total,
        low=window.total * efficiency.low,
        high=window.total * efficiency.high,
        bound=max(window.limits, key=lambda limit: window.limits[limit], default="launch"),
        samples=work.samples * accumulation_steps,
        by_op=tuple(sorted(window.by_op.items(), key=lambda item: -item[1])),
    )


def _of_pass(card: _Card, forward: Work, backward: Work) -> _Sum | None:
    """Return what both passes of a micro-batch take."""
    both = _Sum()
    for part in (forward, backward):
        taken = card.part(part)
        if taken is None:
            return None
        both.add(taken)
    return both


class _Card:
    """A card with its links, and how near kernels come to its peaks."""

    def __init__(self, gpu: GpuSpec, links: Links, world_size: int, efficiency: Efficiency):
        self._gpu = gpu
        self._links = links
        self._world_size = world_size
        self._efficiency = efficiency
        is_half_rate = gpu.flops.get("fp16", math.inf) <= _HALF_RATE * gpu.flops["fp32"]
        self._family = "half-rate" if is_half_rate else _FAMILIES.get(gpu.compute_capability, "")

    def part(self, work: Work, communication: Iterable[Communication] | None = None) -> _Sum | None:
        """Return what a part of a window takes; None where a peak is not known."""
        found = _Sum()
        for op in work.ops:
            limited = self._kernel(op)
            if limited is None:
                return None
            limit, seconds = limited
            found.limits[limit] += seconds * op.calls
            found.by_op[op.op] += seconds * op.calls
        kernels = sum(found.limits.values())
        host = self._efficiency.call_seconds * work.calls
        if host > kernels:
            found.limits.clear()
            found.limits["launch"] = host
        beside = waited = interfering = 0.0
        for one in work.communication if communication is None else communication:
            is_of_host = one.collective in get_args(HostTraffic)
            seconds = (self._of_host(one) if is_of_host else self._collective(one)) * one.calls
            if one.overlaps:
                beside += seconds
                interfering += 0.0 if is_of_host else seconds  # no multiprocessor copies
            else:
                waited += seconds
        busy = max(kernels, host)
        slowed = busy + self._efficiency.interference * min(interfering, kernels)
        found.total = max(slowed, beside) + waited
        found.limits["communication"] = found.total - busy
        return found

    def _kernel(self, op: OpWork) -> tuple[Bound, float] | None:
        """Return what limits a call of an op, and its seconds; None where that is not known."""
        bandwidth = self._gpu.bandwidth_bytes_per_s
        assert bandwidth is not None
        if op.kind == "conversion" and not self._has_tensor_cores(op.precision):
            return "memory", 0.0
        gaps = op.launches * self._efficiency.kernel_seconds
        memory = op.bytes / (bandwidth * self._efficiency.memory[op.kind])
        if not op.flops:
            return ("memory" if memory > gaps else "launch"), memory + gaps
        compute = self._compute(op)
        if compute is None:
            return None
        if max(compute, memory) < gaps:
            return "launch", max(compute, memory) + gaps
        return ("compute" if compute > memory else "memory"), max(compute, memory) + gaps

    def _compute(self, op: OpWork) -> float | None:
        """Return the seconds that the FLOPs of a call take; None where the peak is not known."""
        precision: str | None = op.precision
        while precision is not None and precision not in self._gpu.flops:
            precision = _FALLBACKS.get(precision)
        if precision is None:
            return None
        if op.kind == "depthwise_convolution" and precision in _TENSOR_CORES:
            precision = "fp32"
        family = self._family if self._has_tensor_cores(precision) else "fp32"
        share = self._efficiency.of_compute(op.kind, family)
        filled = 1.0
        if op.product is not None and op.kind != "depthwise_convolution":
            filled = self._filled(op.product)
        return op.flops / (self._gpu.flops[precision] * share * filled)

    def _has_tensor_cores(self, precision: str) -> bool:
        """Whether tensor cores of the card compute in a precision."""
        has_any = self._gpu.compute_capability >= (7, 0)
        return has_any and precision in _TENSOR_CORES and precision in self._gpu.flops

    def _filled(self, product: tuple[float, float, float, float]) -> float:
        """Return the share of a card's work that goes into elements of a product.

        The rest goes into the edges of tiles, and into multiprocessors that wait for the last of
        them. Products without enough tiles for all multiprocessors are split along their depth.
        """
        batch, rows, columns, depth = product
        tiles, filled = max(batch, 1.0), 1.0
        for size in (rows, columns):
            size = max(size, 1.0)
            tile = min(_TILE, max(_LEAST_TILE, 2 ** math.ceil(math.log2(size))))
            count = math.ceil(size / tile)
            tiles *= count
            filled *= size / (count * tile)
        depth = max(depth, 1.0)
        filled *= depth / (math.ceil(depth / _DEPTH) * _DEPTH)
        multiprocessors = self._gpu.multiprocessors
        if tiles < multiprocessors:
            tiles *= max(1.0, min(multiprocessors / tiles, depth / _SPLIT_DEPTH))
        return filled * tiles / (tiles + self._efficiency.waves * multiprocessors)

    def _of_host(self, one: Communication) -> float:
        """Return the seconds of a copy between card and host, or of an op there, with its call."""
        is_copy = one.collective != "in_host"
        links = self._links
        peak = links.host_bytes_per_s if is_copy else links.host_memory_bytes_per_s
        bandwidth = peak * self._efficiency.link
        return one.bytes / bandwidth + self._efficiency.call_seconds

    def _collective(self, one: Communication) -> float:
        """Return the seconds of a collective as a ring makes it."""
        if one.ranks < 2:
            return 0.0
        share = (one.ranks - 1) / one.ranks * (2 if one.collective == "all_reduce" else 1)
        ranks = max(one.ranks, min(self._world_size, one.ranks))
        bandwidth = self._links.bytes_per_s(ranks) * self._efficiency.link
        return share * one.bytes / bandwidth + self._efficiency.collective_seconds
