"""The trace of a real GPU, from PyTorch's memory history.

The history has addresses and sizes, but no phases and no owners. Those are found by counting: the
allocator counts its allocations and frees, so its counter at the beginning of a phase is the place
of that phase among the recorded events. Invariant: every block is in exactly one category; events
are in the order in which the allocator was called.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any

from torch import Tensor

from autobatch.devices.cuda.op_names import Made
from autobatch.devices.cuda.runtime import CudaRuntime
from autobatch.devices.running_module import RunningModule
from autobatch.devices.users_lines import has_users_line, users_line
from autobatch.errors import AutobatchError
from autobatch.memory.snapshot import TraceEvent
from autobatch.memory.trace import Allocation, Category, Label, Mark, Phase, Trace

__all__ = ["HistoryRecorder"]


class HistoryRecorder:
    """Records allocator events, the phases that they fall into, and the owners of blocks."""

    def __init__(
        self, runtime: CudaRuntime, *, labelled: bool = False, follows_modules: bool = True
    ):
        """Record `runtime`.

        Args:
            runtime: the device.
            labelled: whether it is found what made every allocation, and in which line of the
                user's code, which takes time.
            follows_modules: whether calls of modules are followed for that; compiled ones are not.
        """
        self._runtime = runtime
        self._labelled = labelled
        self._first = 0
        self._marks: list[Mark] = []
        self._tags: list[tuple[int, int, Category, str | None]] = []
        self._made: list[Made] = []
        self.running = RunningModule(follows=labelled and follows_modules)
        self._claims: list[tuple[int, Category | None]] = []
        self._kept: list[int] = []
        self._events: Sequence[TraceEvent] = ()
        self._is_on = False
        self._switches = contextlib.ExitStack()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record until the end of the block, or until `stop`."""
        with self._switches:
            self._switches.enter_context(self._runtime.recording(stacks=self._labelled))
            self._first = self._runtime.stats().events
            self._is_on = True
            if self._labelled:
                self._made = self._switches.enter_context(self._runtime.naming_ops(self.running))
            try:
                yield
            finally:
                self.stop()

    def stop(self) -> None:
        """Read what has been recorded, and record no more.

        Raises:
            AutobatchError: more happened than is kept.
        """
        if not self._is_on:
            return
        self._is_on = False
        self.running.stop()
        with self._switches:
            count = self._count()
            trace = self._runtime.snapshot(stacks=self._labelled).traces.get(
                self._runtime.index, ()
            )
            self._events = [e for e in trace if e.action in ("alloc", "free_requested")][:count]
            if len(self._events) < count:
                raise AutobatchError(
                    f"two training windows have {count:,} allocator events, more than the "
                    f"{len(self._events):,} that are kept: use fewer accumulation steps"
                )

    def begin(self, phase: Phase, window: int = 0, micro_batch: int = 0) -> None:
        """Mark the beginning of a phase."""
        if self._is_on:
            self._marks.append(Mark(self._count(), phase, window, micro_batch))

    def tag(self, owned: Iterable[tuple[Any, str | None]], category: Category) -> None:
        """Put the blocks that tensors are in now into a category for their whole life.

        Each comes with the module that owns it; None leaves it to the one that made it.
        """
        if not self._is_on:
            return
        count = self._count()
        for tensor, owner in owned:
            if isinstance(tensor, Tensor) and tensor.device == self._runtime.device:
                address = tensor.untyped_storage().data_ptr()
                self._tags.append((count, address, category, owner))

    def claim(self, category: Category | None) -> None:
        """Remember of what is allocated from now on that it would be of a category, if kept."""
        if self._is_on:
            self._claims.append((self._count(), category))

    def keep(self) -> None:
        """Put what was claimed, and is alive, into the category that it was claimed for."""
        if self._is_on:
            self._kept.append(self._count())

    def live_bytes(self) -> int:
        """Return the bytes of what is alive now, whichever blocks of the cache it is in."""
        return self._runtime.stats().requested_bytes

    def _count(self) -> int:
        return self._runtime.stats().events - self._first

    def trace(self, micro_batch: int, accumulation_steps: int) -> Trace:
        """Return what was recorded."""
        events: list[int] = []
        starts: list[TraceEvent] = []
        lives: list[tuple[int, int]] = []  # of each block: from which event to which it lives
        places = [0]  # of each recorded event: how many events of the trace come before it
        live: dict[int, int] = {}
        for event in self._events:
            if event.action == "alloc":
                live[event.address] = len(starts)
                events.append(len(starts))
                lives.append((len(places) - 1, len(self._events) + 1))
                starts.append(event)
            elif (index := live.pop(event.address, None)) is not None:
                events.append(~index)
                lives[index] = (lives[index][0], len(places) - 1)
            places.append(len(events))
        phases = self._phases(lives)
        categories, owners = self._categories(starts, lives, phases)
        made = self._makers(len(starts))
        seen = dict.fromkeys(event.stream for event in starts)
        streams = {stream: number for number, stream in enumerate(seen)}
        return Trace(
            micro_batch=micro_batch,
            accumulation_steps=accumulation_steps,
            blocks=tuple(
                Allocation(
                    e.size_bytes,
                    category,
                    phase,
                    made[index].op,
                    streams[e.stream],
                    self._label(e, category, phase, owners.get(index), made[index]),
                )
                for index, (e, category, phase) in enumerate(
                    zip(starts, categories, phases, strict=True)
                )
            ),
            events=tuple(events),
            marks=tuple(
                Mark(places[min(m.event, len(places) - 1)], m.phase, m.window, m.micro_batch)
                for m in self._marks
            ),
        )

    def _label(
        self, event: TraceEvent, category: Category, phase: Phase, owner: str | None, made: Made
    ) -> Label:
        """Return what reports call a block."""
        shape, dtype = _first_tensor(event.size_bytes, made)
        where = users_line(event.stack) if has_users_line(phase) else ""
        return Label(_module_of(category, owner, made.module), shape, dtype, where)

    def _phases(self, lives: Sequence[tuple[int, int]]) -> list[Phase]:
        begins = [mark.event for mark in self._marks]
        places = (bisect_right(begins, start) for start, _ in lives)
        return [self._marks[place - 1].phase if place else "setup" for place in places]

    def _categories(
        self,
        starts: Sequence[TraceEvent],
        lives: Sequence[tuple[int, int]],
        phases: Sequence[Phase],
    ) -> tuple[list[Category], dict[int, str]]:
        """Find owners by address and time; a block that no tensor owns is known by its life.

        Also return the modules that own blocks.
        """
        at_address: dict[int, list[int]] = {}
        for index, event in enumerate(starts):
            at_address.setdefault(event.address, []).append(index)
        owned: dict[int, Category] = {}
        modules: dict[int, str] = {}
        for count, address, category, owner in self._tags:
            for index in at_address.get(address, ()):
                if lives[index][0] < count <= lives[index][1]:
                    owned[index] = category
                    if owner is not None:
                        modules[index] = owner
        for index, life in enumerate(lives):
            if index not in owned and (claimed := self._claimed(life)) is not None:
                owned[index] = claimed
        backwards = [mark.event for mark in self._marks if mark.phase == "backward"]
        end = len(self._events)
        categories = [
            owned.get(index) or _by_life(life, phase, backwards, end)
            for index, (life, phase) in enumerate(zip(lives, phases, strict=True))
        ]
        return categories, modules

    def _claimed(self, life: tuple[int, int]) -> Category | None:
        """Return the category for which a block was claimed, if it was alive to be kept."""
        start, freed = life
        place = bisect_right(self._claims, start, key=lambda claim: claim[0])
        category = self._claims[place - 1][1] if place else None
        keep = bisect_right(self._kept, start)
        is_kept = keep < len(self._kept) and self._kept[keep] <= freed
        return category if is_kept else None

    def _makers(self, blocks: int) -> Sequence[Made]:
        """Return what made each block.

        Raises:
            AutobatchError: other allocations were seen by who names them.
        """
        if not self._labelled:
            return [Made("", "")] * blocks
        if len(self._made) != blocks:
            raise AutobatchError(
                f"PyTorch's profiler saw {len(self._made):,} allocations where its memory history "
                f"has {blocks:,}: measure without names of ops"
            )
        return self._made


def _module_of(category: Category, owner: str | None, maker: str) -> str:
    if owner is not None:
        return owner
    return "" if category == "workspace" else maker  # a library keeps it for all that follows


def _first_tensor(size_bytes: int, made: Made) -> tuple[tuple[int, ...], str]:
    """Return shape and dtype of the first tensor that fills a block; empty where none does."""
    for shape, dtype in made.tensors:
        if prod(shape) * dtype.itemsize == size_bytes:
            return shape, str(dtype).removeprefix("torch.")
    return (), ""


def _by_life(life: tuple[int, int], phase: Phase, backwards: Sequence[int], end: int) -> Category:
    start, freed = life
    if phase == "setup":
        return "other"
    if freed > end:
        return "workspace"  # a library keeps it, and no tensor shows it
    if phase == "inputs":
        return "inputs"
    next_backward = bisect_right(backwards, start)
    if phase == "forward" and next_backward < len(backwards) and backwards[next_backward] < freed:
        return "activations"
    return "temporaries"
