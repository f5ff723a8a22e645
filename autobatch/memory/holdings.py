"""What the blocks of a recording are for, from their stacks and from how long they live.

Invariant: a category is named only with what it is known by; what cannot be told is "unknown".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from autobatch.memory.recording import Recording
from autobatch.memory.snapshot import Annotation, Stack, TraceEvent
from autobatch.memory.stacks import Origin, Part, origin_of
from autobatch.records.explanation import Basis

__all__ = ["UNKNOWN", "Life", "classify", "lives_of"]

UNKNOWN: Final = "unknown (no stack)"
_SILENT: Final = "unknown (the stack does not tell)"
_BEFORE: Final = "from before the recording"
_BEFORE_FREED: Final = "from before, freed in the recording"
_OUTSIDE: Final = "outside of modules"
_FINAL: Final = {
    "optimizer": "optimizer state or temporaries",
    "backward": "gradients or temporaries",
    "forward": "activations or outputs",
    "outside": _OUTSIDE,
}
_EARLIER: Final = {
    "optimizer": "optimizer state",
    "backward": "gradients",
    "forward": "activations or outputs from before",
    "outside": _OUTSIDE,
}

_NOWHERE = Origin(None, False, None, "", "")


@dataclass(frozen=True, slots=True)
class Life:
    """One block: when it was allocated and freed, and what is known of it.

    Attributes:
        address, stream: of the block.
        requested_bytes: what was asked for.
        born: index of the event that allocated it; None where it was there before.
        freed: index of the event that requested its free; None where it outlives the recording.
        origin: what its stack tells.
        label: text that the user gave to it.
        profiler_category: what PyTorch's memory profiler took it for; mostly empty.
        has_stack: whether a stack was recorded at all.
        step: the optimizer's step that was under way, by PyTorch's own annotation.
    """

    address: int
    stream: int
    requested_bytes: int
    born: int | None
    freed: int | None
    origin: Origin
    label: str
    profiler_category: str
    has_stack: bool
    step: Annotation | None


def lives_of(
    recording: Recording, final_stacks: Mapping[int, Stack], annotations: Sequence[Annotation]
) -> tuple[Life, ...]:
    """Return every block that is alive at some time of a rewound recording, by birth.

    Args:
        recording: the events and the state before them.
        final_stacks: by address, where the blocks of the last state were allocated.
        annotations: the named spans of the device.
    """
    steps = [each for each in annotations if each.name.startswith("Optimizer.step")]
    origins: dict[int, Origin] = {}

    def origin(stack: Stack) -> Origin:
        found = origins.get(id(stack))
        if found is None:
            found = origins[id(stack)] = origin_of(stack) if stack else _NOWHERE
        return found

    births: dict[int, tuple[int | None, int, int]] = {
        block.address: (None, part.stream, block.requested_bytes)
        for part in recording.start
        for block in part.blocks
        if block.state == "allocated"
    }
    labels: dict[int, str] = {}
    lives = []

    def end(address: int, freed: int | None) -> None:
        born, stream, requested = births.pop(address)
        event = None if born is None else recording.events[born]
        stack = event.stack if event else () if freed is not None else final_stacks.get(address, ())
        at = event.time_us if event else 0
        lives.append(
            Life(
                address=address,
                stream=stream,
                requested_bytes=requested,
                born=born,
                freed=freed,
                origin=origin(stack),
                label=labels.pop(address, "") or (event.label if event else ""),
                profiler_category=event.category if event else "",
                has_stack=bool(stack),
                step=next((each for each in steps if at and _spans(each, at)), None),
            )
        )

    for index, event in enumerate(recording.events):
        if event.action == "alloc":
            births[event.address] = (index, event.stream, event.size_bytes)
        elif event.action == "free_requested" and event.address in births:
            end(event.address, index)
        elif event.action == "free_completed" and event.address in births:
            end(event.address, index)  # older recordings may begin between the two
        elif event.action == "annotate":
            labels[event.address] = event.label
    for address in list(births):
        end(address, None)
    return tuple(sorted(lives, key=lambda life: -1 if life.born is None else life.born))


def _spans(annotation: Annotation, time_us: int) -> bool:
    end = annotation.end_us
    return annotation.start_us <= time_us and (end is None or time_us <= end)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Which part of a training step was under way at each event, as far as stacks tell."""

    events: tuple[int, ...]
    parts: tuple[Part | None, ...]  # None where something without a stack was allocated
    freed_by: Mapping[int, Origin]

    def end(self, index: int, part: Part) -> int | None:
        """Return the event with which the part that `index` is in ended; None if it did not."""
        at = bisect_right(self.events, index)
        while at < len(self.parts) and self.parts[at] == part:
            at += 1
        return self.events[at] if at < len(self.parts) else None

    def freed(self, index: int) -> Part | None:
        """Return the part that a free was requested in."""
        at = bisect_right(self.events, index) - 1
        by = self.freed_by.get(index, _NOWHERE)
        return by.part or (self.parts[at] if at >= 0 else None)


def classify(lives: Sequence[Life], events: Sequence[TraceEvent]) -> list[tuple[str, Basis]]:
    """Return what each block is for, and what that is known by, in the order of `lives`."""
    parts = _parts_of(lives, events)
    return [_classify(life, parts, events) for life in lives]


def _parts_of(lives: Sequence[Life], events: Sequence[TraceEvent]) -> _Parts:
    known: dict[int, Part | None] = {}
    freed_by: dict[int, Origin] = {}
    origins: dict[int, Origin] = {}
    for life in lives:
        part: Part | None = "optimizer" if life.step else life.origin.part
        if life.born is not None and (part is not None or not life.has_stack):
            known[life.born] = part
        if life.freed is None:
            continue
        stack = events[life.freed].stack
        if stack and (life.born is None or stack is not events[life.born].stack):
            if id(stack) not in origins:
                origins[id(stack)] = origin_of(stack)
            freed_by[life.freed] = origins[id(stack)]
    indices = sorted(known)
    # Code of the user's own between two allocations of one part does not end that part.
    kept = [index for index in indices if known[index] != "outside"]
    return _Parts(tuple(kept), tuple(known[index] for index in kept), freed_by)


def _classify(life: Life, parts: _Parts, events: Sequence[TraceEvent]) -> tuple[str, Basis]:
    if life.profiler_category not in ("", "unknown"):
        return life.profiler_category.replace("_", " "), "profiler"
    origin = life.origin
    if origin.purpose in ("workspace", "communication"):
        return origin.purpose, "stack"
    if origin.purpose == "parameters":
        return "parameters and buffers", "stack"
    if origin.purpose == "optimizer state":
        return "optimizer state", "stack"
    if life.born is None:
        return _from_before(life, parts) if events else _in_last_state(life)
    if life.step and not life.has_stack:
        category, _ = _of_step(life, parts, events)
        return category, "annotation"
    if not life.has_stack:
        return UNKNOWN, "nothing"
    if origin.part == "optimizer":
        return _of_step(life, parts, events)
    if origin.part == "backward":
        return _of_backward(life, parts)
    if origin.part in ("forward", "outside"):
        return _of_forward(life, parts)
    return _SILENT, "nothing"


def _in_last_state(life: Life) -> tuple[str, Basis]:
    """Say what a stack tells where nothing is known of lifetimes."""
    if life.origin.part is not None:
        return _FINAL[life.origin.part], "stack"
    return (_SILENT if life.has_stack else UNKNOWN), "nothing"


def _from_before(life: Life, parts: _Parts) -> tuple[str, Basis]:
    if life.origin.part is not None:
        return _EARLIER[life.origin.part], "stack and lifetime"
    if life.freed is None:
        return _BEFORE, "lifetime"
    by = parts.freed_by.get(life.freed, _NOWHERE)
    if by.purpose == "zeroing":
        return "gradients", "lifetime"
    if by.part == "backward":
        return "from before, freed in the backward pass", "lifetime"
    if by.part == "optimizer":
        return "from before, freed in the optimizer step", "lifetime"
    return _BEFORE_FREED, "lifetime"


def _of_step(life: Life, parts: _Parts, events: Sequence[TraceEvent]) -> tuple[str, Basis]:
    assert life.born is not None
    end = parts.end(life.born, "optimizer")
    if life.step and life.step.end_us is not None:
        kept = life.freed is None or events[life.freed].time_us > life.step.end_us
    elif life.freed is None and end is None:
        return "optimizer state or temporaries", "stack"
    else:
        kept = life.freed is None or (end is not None and life.freed > end)
    category = "optimizer state" if kept else "optimizer temporaries"
    return category, "stack and lifetime"


def _of_backward(life: Life, parts: _Parts) -> tuple[str, Basis]:
    assert life.born is not None
    if life.origin.recomputes:
        return "activations computed again", "stack"
    end = parts.end(life.born, "backward")
    if life.freed is None and end is None:
        if life.origin.purpose == "gradients":
            return "gradients", "stack"
        return "gradients or temporaries", "stack"
    if life.freed is None or (end is not None and life.freed > end):
        return "gradients", "stack and lifetime"
    return "backward temporaries", "stack and lifetime"


def _of_forward(life: Life, parts: _Parts) -> tuple[str, Basis]:
    assert life.born is not None
    outside = life.origin.part == "outside"
    if life.freed is None:
        if outside:
            return _OUTSIDE, "stack"
        ended = parts.end(life.born, "forward")
        return (
            ("activations", "stack")
            if ended is None
            else ("kept after forward", "stack and lifetime")
        )
    part = parts.freed(life.freed)
    if part == "backward":
        return "activations", "stack and lifetime"
    if outside:
        return _OUTSIDE, "stack"
    end = parts.end(life.born, "forward")
    if end is None or life.freed <= end:
        return "forward temporaries", "stack and lifetime"
    if part is None:
        return "activations or outputs", "stack"
    return "kept after forward", "stack and lifetime"
