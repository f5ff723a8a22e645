"""The ordered allocations and frees of training windows.

Invariant: blocks are numbered in the order of their allocation, sizes are the requested bytes
(the allocator rounds, the trace does not), and at every instant the categories of the live
blocks sum to the allocated bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

__all__ = [
    "CATEGORIES",
    "UNLABELLED",
    "Allocation",
    "Bare",
    "Category",
    "Kernel",
    "Label",
    "Mark",
    "Phase",
    "Requests",
    "Trace",
    "running_bytes",
]

Category = Literal[
    "parameters",
    "buffers",
    "gradients",
    "optimizer_state",
    "activations",
    "temporaries",
    "inputs",
    "workspace",
    "other",
]
CATEGORIES: tuple[Category, ...] = get_args(Category)

Phase = Literal["setup", "inputs", "forward", "backward", "step", "evaluate"]


@dataclass(frozen=True, slots=True)
class Label:
    """What reports call a block, beside its op: as in `records.holders.Holder`.

    Attributes:
        module: that made it, or owns it.
        shape: of its first tensor; empty where no tensor shows it.
        dtype: of its first tensor; empty where no tensor shows it.
        where: the user's line that ran.
    """

    module: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    where: str = ""


UNLABELLED = Label()


@dataclass(frozen=True, slots=True)
class Allocation:
    """One block that a trace allocates: its requested bytes, purpose, phase and op.

    `op` is empty where a real GPU's allocations were not traced to their ops. Streams count from 0,
    the stream that the run begins on. Labels are for reports: blocks that differ in theirs alone
    are equal.
    """

    size_bytes: int
    category: Category
    phase: Phase
    op: str
    stream: int = 0
    label: Label = field(default=UNLABELLED, compare=False)


@dataclass(frozen=True, slots=True)
class Mark:
    """A phase that begins at index `event` of the trace; windows and micro-batches count from 0."""

    event: int
    phase: Phase
    window: int
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Allocations and frees of consecutive training windows at one micro-batch.

    Attributes:
        micro_batch: samples in each forward/backward.
        accumulation_steps: micro-batches in each traced window.
        blocks: every block, in order of allocation.
        events: `b` allocates `blocks[b]`; `~b` (negative) frees it.
        marks: where phases begin, in order.
        bare: the same without the scratch of kernels, where a rule says what that is.
        parts: of elements that were spread equally, before each was rounded up; in order, each once
            (`memory/rounding.py`).
    """

    micro_batch: int
    accumulation_steps: int
    blocks: tuple[Allocation, ...]
    events: tuple[int, ...]
    marks: tuple[Mark, ...]
    bare: Bare | None = field(default=None, compare=False, repr=False)
    parts: tuple[Fraction, ...] = field(default=(), compare=False, repr=False)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Requested bytes of each block."""
        return tuple(block.size_bytes for block in self.blocks)

    @property
    def streams(self) -> tuple[int, ...] | None:
        """Stream of each block; None where all are on the first."""
        streams = tuple(block.stream for block in self.blocks)
        return streams if any(streams) else None

    def allocated(self) -> list[int]:
        """Return the requested bytes alive after each event."""
        return running_bytes(self.sizes, self.events)

    def live_at(self, event: int) -> list[int]:
        """Return the blocks alive just after `event`, in order of allocation."""
        live: dict[int, None] = {}
        for index in self.events[: event + 1]:
            if index >= 0:
                live[index] = None
            else:
                del live[~index]
        return list(live)

    def by_category(self, event: int) -> dict[Category, int]:
        """Return the live bytes of every category just after `event`."""
        totals: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        for index in self.live_at(event):
            totals[self.blocks[index].category] += self.blocks[index].size_bytes
        return totals

    def peak_event(self) -> int:
        """Return the index of the first event after which most requested bytes are alive."""
        allocated = self.allocated()
        return max(range(len(allocated)), key=allocated.__getitem__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel that ran in a trace, and may have taken scratch.

    Attributes:
        kind: what it is apart from sizes; equal for the same kernel at other micro-batches.
        name: of its scratch, in reports.
        phase: in which it ran.
        stream: on which it ran.
        start: events of the bare trace before it.
        results: events of the bare trace up to and with the allocation of each of its results.
        end: events of the bare trace before it ended.
        marks: phases that had begun.
        numbers: sizes and strides of its arguments.
        takes: the rule, of such numbers (`memory/scratch.py`).
        label: of its scratch, for reports.
    """

    kind: Hashable
    name: str
    phase: Phase
    stream: int
    start: int
    results: tuple[int, ...]
    end: int
    marks: int
    numbers: tuple[int, ...]
    takes: Callable[[tuple[int, ...]], Sequence[int | str]]
    label: Label = field(default=UNLABELLED, compare=False)

    def at(self, numbers: tuple[int, ...]) -> Kernel:
        """Return the same kernel with other numbers."""
        return Kernel(
            kind=self.kind,
            name=self.name,
            phase=self.phase,
            stream=self.stream,
            start=self.start,
            results=self.results,
            end=self.end,
            marks=self.marks,
            numbers=numbers,
            takes=self.takes,
            label=self.label,
        )

    @property
    def place(self) -> tuple[object, ...]:
        """What is the same of a kernel at every micro-batch, unless traces do not align."""
        return (self.kind, self.phase, self.start, self.results, self.end, self.marks)


@dataclass(frozen=True, slots=True)
class Bare:
    """A trace without scratch, and the kernels that take it."""

    trace: Trace
    kernels: tuple[Kernel, ...]


class Requests(NamedTuple):
    """What a trace asks an allocator for.

    Attributes:
        sizes: requested bytes of each block.
        events: as in `Trace.events`.
        streams: of each block; None where all are on the first.
    """

    sizes: Sequence[int]
    events: Sequence[int]
    streams: Sequence[int] | None


def running_bytes(sizes: Sequence[int], events: Sequence[int]) -> list[int]:
    """Return the live bytes after each event, for blocks of the given sizes."""
    return list(accumulate(sizes[e] if e >= 0 else -sizes[~e] for e in events))
