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

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from autobatch.memory.trace import Allocation, Bare, Kernel, Mark, Trace

__all__ = ["RESULT", "RESULTS", "Step", "Steps", "with_scratch"]

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
    events: list[int] = []
    blocks: list[Allocation] = []
    marks: list[Mark] = []
    numbers: dict[int, int] = {}  # of blocks of the bare trace: their number in the whole one
    taken: dict[tuple[int, int], int] = {}
    waiting = iter(trace.marks)
    mark = next(waiting, None)
    place = 0

    def up_to(end: int, kernels: int | None) -> None:
        """Copy events before `end`, and the marks that come before so many marks had begun."""
        nonlocal place, mark
        while True:
            is_next = mark is not None and mark.event == place
            if mark is not None and is_next and (kernels is None or len(marks) < kernels):
                marks.append(replace(mark, event=len(events)))
                mark = next(waiting, None)
            elif place < end:
                event = trace.events[place]
                place += 1
                if event >= 0:
                    numbers[event] = len(blocks)
                    blocks.append(trace.blocks[event])
                    events.append(numbers[event])
                else:
                    events.append(~numbers[~event])
            else:
                return

    for number, kernel in enumerate(bare.kernels):
        for at, piece, size_bytes, name in _played(kernel):
            up_to(at, kernel.marks)
            if size_bytes is None:
                events.append(~taken[number, piece])
                continue
            taken[number, piece] = len(blocks)
            events.append(len(blocks))
            blocks.append(Allocation(size_bytes, "workspace", kernel.phase, name, kernel.stream))
    up_to(len(trace.events), None)
    return Trace(
        micro_batch=trace.micro_batch,
        accumulation_steps=trace.accumulation_steps,
        blocks=tuple(blocks),
        events=tuple(events),
        marks=tuple(marks),
        bare=bare,
    )


def _played(kernel: Kernel) -> Iterator[tuple[int, int, int | None, str]]:
    """Yield where each piece is taken or given back: its number, its bytes or None, its name."""
    at, made, name = kernel.start, 0, kernel.name
    alive: list[int | None] = []
    for step in kernel.takes(kernel.numbers):
        if step == RESULT:
            at = kernel.results[made] if made < len(kernel.results) else kernel.end
            made += 1
        elif step == RESULTS:
            at = kernel.end
        elif isinstance(step, str):
            name = step
        elif step >= 0:
            alive.append(len(alive) if step else None)
            if step:
                yield at, len(alive) - 1, step, name
        elif (piece := alive[~step]) is not None:
            alive[~step] = None
            yield at, piece, None, name
    for piece in alive:
        if piece is not None:
            yield kernel.end, piece, None, name
