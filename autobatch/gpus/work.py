"""What a training window computes, moves and communicates: the input of an estimate of its time.

The figures are those of one simulated run: of every call of an op its FLOPs, the bytes that it
reads and writes in the memory of the card, and the shape of the matrix product that it is, if any;
of every collective, and of what goes through the host and no loader does ahead, its bytes. They
hold for every card that runs the same kernels; `autobatch.gpus.roofline` makes seconds of them.

Invariant: a sum of works has the FLOPs, bytes and calls of its parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

__all__ = [
    "Collective",
    "Communication",
    "HostTraffic",
    "Kind",
    "LinearWork",
    "OpWork",
    "WindowWork",
    "Work",
]

Kind = Literal[
    "matmul",
    "convolution",
    "grouped_convolution",
    "depthwise_convolution",
    "conversion",
    "recurrent",
    "attention",
    "cudnn_attention",
    "norm",
    "reduction",
    "indexing",
    "copy",
    "elementwise",
    "optimizer",
]
"""What an op's kernels have in common: how near to a card's peaks they come.

A conversion is what a convolution in NCHW does beside itself where tensor cores run it.
"""

Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast"]
HostTraffic = Literal["to_host", "from_host", "in_host"]
"""A copy from the card, a copy to it, and an op of the host on what came off the card."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpWork:
    """Calls of one op that are alike; the figures are those of one call.

    Attributes:
        op: its name, such as "mm" or "convolution_backward".
        kind: what its kernels have in common with others.
        precision: what it computes in: "fp64", "fp32", "tf32", "fp16", "bf16", "fp8" or "other".
        flops: floating point operations of products; 0 for ops that only memory limits.
        bytes: read from and written to the card's memory.
        product: (batch, rows, columns, depth) of the matrix product that it is; None for others.
        launches: kernels that it launches.
        calls: how often it runs.
    """

    op: str
    kind: Kind
    precision: str
    flops: float
    bytes: float
    product: tuple[float, float, float, float] | None = None
    launches: float = 1.0
    calls: int = 1

    def between(self, other: OpWork, share: float) -> OpWork:
        """Return what lies a share of the way from this call to another; beyond it above 1."""

        def line(first: float, second: float) -> float:
            return first + share * (second - first)

        product = None
        if self.product is not None and other.product is not None:
            batch, rows, columns, depth = map(line, self.product, other.product)
            product = (batch, rows, columns, depth)
        return replace(
            self,
            flops=line(self.flops, other.flops),
            bytes=line(self.bytes, other.bytes),
            product=product,
            launches=line(self.launches, other.launches),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """One collective of a rank, or one copy between its card and the host, or one op there.

    Attributes:
        collective: what is done.
        bytes: of the whole tensor: what an all-gather makes, a reduce-scatter takes, a copy moves;
            of an op of the host, what it reads and writes.
        ranks: how many take part; 1 with the host.
        overlaps: whether other kernels run meanwhile, as under FSDP and DDP; those of tensor
            parallel layers are waited for, and so are copies on the stream of the kernels, and ops
            of the host.
        calls: how often it runs.
    """

    collective: Collective | HostTraffic
    bytes: float
    ranks: int
    overlaps: bool
    calls: int = 1


@dataclass(frozen=True, slots=True)
class Work:
    """What a part of a window does.

    Attributes:
        ops: calls that are alike, together.
        communication: collectives and what goes through the host, in order.
        sequence: of every call in order, its index in `ops`; empty in sums.

    >>> op = OpWork(op="mm", kind="matmul", precision="bf16", flops=8.0, bytes=24.0)
    >>> twice = Work.of([op, op])
    >>> twice.ops[0].calls, twice.flops, (twice + twice).bytes
    (2, 16.0, 96.0)
    """

    ops: tuple[OpWork, ...] = ()
    communication: tuple[Communication, ...] = ()
    sequence: tuple[int, ...] = ()

    @classmethod
    def of(cls, calls: Iterable[OpWork], communication: Sequence[Communication] = ()) -> Work:
        """Make a work of single calls in order."""
        places: dict[OpWork, int] = {}
        sequence = tuple(places.setdefault(call, len(places)) for call in calls)
        counts = Counter(sequence)
        ops = tuple(replace(op, calls=counts[place]) for op, place in places.items())
        return cls(ops, tuple(communication), sequence)

    @property
    def flops(self) -> float:
        """Floating point operations of all calls."""
        return sum(op.flops * op.calls for op in self.ops)

    @property
    def bytes(self) -> float:
        """Bytes that all calls read and write."""
        return sum(op.bytes * op.calls for op in self.ops)

    @property
    def calls(self) -> int:
        """How many calls of ops there are."""
        return sum(op.calls for op in self.ops)

    def __add__(self, other: Work) -> Work:
        """Return both, in no order."""
        counts: Counter[OpWork] = Counter()
        for op in (*self.ops, *other.ops):
            counts[replace(op, calls=1)] += op.calls
        ops = tuple(replace(op, calls=calls) for op, calls in counts.items())
        return Work(ops, self.communication + other.communication)

    @classmethod
    def at(cls, n: int, first: tuple[int, Work], second: tuple[int, Work]) -> Work:
        """Return the work at micro-batch n, from those at two others, on a straight line.

        Args:
            n: micro-batch that is asked for.
            first: a micro-batch, and the work there.
            second: the same at another micro-batch.

        Raises:
            ValueError: they are not the same calls in the same order.
        """
        return LinearWork.of(first, second).at(n)


@dataclass(frozen=True, slots=True)
class LinearWork:
    """A work at any micro-batch.

    Attributes:
        start: the micro-batch of the first of each pair.
        step: how much larger the micro-batch of the second one is.
        pairs: the same calls at both.
        communication: the same collectives and traffic with the host at both.
    """

    start: int
    step: int
    pairs: tuple[tuple[OpWork, OpWork], ...]
    communication: tuple[tuple[Communication, Communication], ...]

    @classmethod
    def of(cls, first: tuple[int, Work], second: tuple[int, Work]) -> LinearWork:
        """Lay the works at two micro-batches side by side.

        Raises:
            ValueError: they are not the same calls in the same order.
        """
        (start, low), (end, high) = first, second
        names = [[work.ops[place].op for place in work.sequence] for work in (low, high)]
        collectives = [[one.collective for one in work.communication] for work in (low, high)]
        if names[0] != names[1] or collectives[0] != collectives[1] or start == end:
            raise ValueError(f"the windows of micro-batch {start} and {end} are not the same calls")
        counts = Counter(zip(low.sequence, high.sequence, strict=True))
        pairs = tuple(
            (replace(low.ops[one], calls=calls), replace(high.ops[other], calls=calls))
            for (one, other), calls in counts.items()
        )
        communication = tuple(zip(low.communication, high.communication, strict=True))
        return cls(start, end - start, pairs, communication)

    def at(self, n: int) -> Work:
        """Return the work at micro-batch n."""
        share = (n - self.start) / self.step
        return Work(
            tuple(first.between(second, share) for first, second in self.pairs),
            tuple(
                replace(first, bytes=first.bytes + share * (second.bytes - first.bytes))
                for first, second in self.communication
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowWork:
    """A training window by its parts, of which windows of any length are put together.

    Attributes:
        samples: samples of a micro-batch.
        forward: forward pass and loss of the first micro-batch.
        backward: its backward pass, which makes the gradients.
        later_forward: the same of every other micro-batch; None where the run had only one.
        later_backward: its backward pass, which adds to the gradients.
        update: clip, step and zero.
        averages: collectives of the last backward pass: gradients of ranks with whole copies.
    """

    samples: int
    forward: Work
    backward: Work
    later_forward: Work | None = None
    later_backward: Work | None = None
    update: Work
    averages: tuple[Communication, ...] = ()

    @property
    def micro_batch(self) -> Work:
        """What one micro-batch does: the first one."""
        return self.forward + self.backward
