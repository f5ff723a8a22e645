"""What kernels allocate beside their results, and give back before they return.

A rule says it in steps, in the order of the kernel's code: a number takes so many bytes, `~i` gives
back the piece that was taken as number i, `RESULT` stands for the allocation of the next result and
`RESULTS` for that of all that are left. Any other text names the pieces that follow, for reports.
What is not given back is when the kernel ends.

Rules depend on shapes in ways that no line follows: a sum is split over blocks from some size on,
a gradient is sorted from some size on. So a trace of a simulated GPU keeps its kernels apart from
what tensors take, and a trace model asks the rules again at every micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from autobatch.memory.trace import Allocation, Bare, Kernel, Mark, Trace

__all__ = ["RESULT", "RESULTS", "Interleaved", "Step", "Steps", "interleaved", "with_scratch"]

RESULT: Final = "result"
RESULTS: Final = "results"

Step = int | str
Steps = Sequence[Step]


def with_scratch(bare: Bare) -> Trace:
    """Return the whole trace, which remembers the bare one.

    >>> from autobatch.memory.trace import Bare, Kernel, Trace
    >>> bare = Trace(
    ...     micro_batch=1,
    ...     accumulation_steps=1,
    ...     blocks=(Allocation(8, "temporaries", "forward", "sum"),),
    ...     events=(0,),
    ...     marks=(),
    ... )
    >>> kernel = Kernel(
    ...     kind="sum", name="scratch", phase="forward", stream=0, start=0, results=(1,), end=1,
    ...     marks=0, numbers=(5,), takes=lambda numbers: [RESULTS, 2 * numbers[0]],
    ... )
    >>> whole = with_scratch(Bare(bare, (kernel,)))
    >>> whole.sizes, whole.events
    ((8, 10), (0, 1, -2))
    """
    trace = bare.trace
    count = len(trace.blocks)
    asked: dict[tuple[int, tuple[int, ...]], Steps] = {}  # by rule, which the kernels hold
    steps = []
    for kernel in bare.kernels:
        question = id(kernel.takes), kernel.numbers
        if question not in asked:
            asked[question] = kernel.takes(kernel.numbers)
        steps.append(asked[question])
    mixed = interleaved(trace.events, zip(bare.kernels, steps, strict=True), count)
    order = [event for event in mixed.events if event >= 0]
    numbers = [0] * len(order)
    for number, block in enumerate(order):
        numbers[block] = number
    blocks = list(trace.blocks)
    for kernel, size_bytes, name in mixed.pieces:
        blocks.append(
            Allocation(size_bytes, "workspace", kernel.phase, name, kernel.stream, kernel.label)
        )
    return Trace(
        micro_batch=trace.micro_batch,
        accumulation_steps=trace.accumulation_steps,
        blocks=tuple([blocks[block] for block in order]),
        events=tuple([numbers[e] if e >= 0 else ~numbers[~e] for e in mixed.events]),
        marks=tuple(_moved(trace.marks, mixed.places)),
        bare=bare,
        parts=trace.parts,
    )


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Events of a bare trace with those of scratch between them.

    Attributes:
        events: as in `Trace.events`; pieces of scratch are numbered after all blocks of the trace.
        pieces: of each one the kernel, the bytes and the name.
        places: where events were put in, in order: how many events of the bare trace come before,
            and how many phases have begun.
    """

    events: list[int]
    pieces: list[tuple[Kernel, int, str]]
    places: list[tuple[int, int]]


def interleaved(
    bare: Sequence[int], kernels: Iterable[tuple[Kernel, Steps]], count: int
) -> Interleaved:
    """Put what kernels take, in so many steps, between the events of a trace of `count` blocks."""
    events: list[int] = []
    pieces: list[tuple[Kernel, int, str]] = []
    places: list[tuple[int, int]] = []
    place = 0
    for kernel, steps in kernels:
        if not steps:
            continue
        first = count + len(pieces)
        for when, piece, size_bytes, name in _played(tuple(steps), kernel.name):
            if when == _AT_START:
                at = kernel.start
            elif when < len(kernel.results):
                at = kernel.results[when]
            else:
                at = kernel.end
            if at > place:
                events += bare[place:at]
                place = at
            places.append((place, kernel.marks))
            if size_bytes:
                events.append(first + piece)
                pieces.append((kernel, size_bytes, name))
            else:
                events.append(~(first + piece))
    events += bare[place:]
    return Interleaved(events, pieces, places)


_AT_START: Final = -1
_AT_END: Final = 1 << 30

_MOST_STEPS: Final = 4096


@functools.lru_cache(_MOST_STEPS)
def _played(steps: tuple[Step, ...], name: str) -> tuple[tuple[int, int, int, str], ...]:
    """Return when each piece is taken or given back: its number, its bytes or 0, its name.

    It is at the start of the kernel, with its result of that number, or at its end.
    """
    when, taken = _AT_START, 0
    alive: list[int | None] = []
    played: list[tuple[int, int, int, str]] = []
    for step in steps:
        if step == RESULT:
            when = 0 if when == _AT_START else when + 1
        elif step == RESULTS:
            when = _AT_END
        elif isinstance(step, str):
            name = step
        elif step >= 0:
            alive.append(taken if step else None)
            if step:
                played.append((when, taken, step, name))
                taken += 1
        elif (piece := alive[~step]) is not None:
            alive[~step] = None
            played.append((when, piece, 0, name))
    played += [(_AT_END, piece, 0, name) for piece in alive if piece is not None]
    return tuple(played)


def _moved(marks: Sequence[Mark], places: Sequence[tuple[int, int]]) -> Iterator[Mark]:
    """Yield marks of a trace into which events were put."""
    before = 0
    for number, mark in enumerate(marks):
        while before < len(places):
            place, begun = places[before]
            if mark.event < place or (mark.event == place and number < begun):
                break
            before += 1
        yield Mark(mark.event + before, mark.phase, mark.window, mark.micro_batch)
