"""The trace of a simulated GPU: the storages of fake tensors, as they come and go.

A storage is allocated when the first tensor on it appears and freed when its last reference goes,
as with the caching allocator. Invariant: every block is in exactly one category.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.running_module import RunningModule
from autobatch.devices.users_lines import UsersLines, has_users_line
from autobatch.memory.scratch import Steps, with_scratch
from autobatch.memory.trace import (
    Allocation,
    Bare,
    Category,
    Kernel,
    Label,
    Mark,
    Phase,
    Trace,
    running_bytes,
)
from autobatch.support.tensor_parts import parts_of
from autobatch.support.torch_private import current_graph_task_id

__all__ = ["StorageRecorder", "Takes"]


@dataclass(slots=True)
class _Block:
    """A block while it is being recorded; its category is settled at the end."""

    size_bytes: int
    phase: Phase
    op: str
    category: Category | None
    module: str
    where: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    stream: int = 0
    outlived_forward: bool = False
    is_forward: bool = False


Takes = Callable[[tuple[int, ...]], Steps]


@dataclass(slots=True)
class _Running:
    """A kernel while it runs."""

    kind: Hashable
    name: str
    numbers: tuple[int, ...]
    takes: Takes
    start: int
    module: str
    where: str
    results: list[int] = field(default_factory=list)


class _StorageRef(weakref.ref):  # type: ignore[type-arg]
    """A weak reference that knows which block its storage was."""

    __slots__ = ("block", "key")
    block: int
    key: int


class StorageRecorder:
    """Numbers storages in order of allocation, and logs when each is allocated and freed.

    Views and in-place results share a storage that was seen before, so they are no new blocks.

    Attributes:
        phase: the phase that runs.
        is_muted: whether what is made now has no memory on a real GPU.
        running: tells which module of the model is at work.
        parts: as in `Trace.parts`.
    """

    is_muted = False
    parts: tuple[Fraction, ...] = ()

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._events: list[int] = []
        self._marks: list[Mark] = []
        self._live: dict[int, _StorageRef] = {}
        self.phase: Phase = "setup"
        self._pending: Category | None = None
        self._kernels: list[Kernel] = []
        self._running: _Running | None = None
        self._latest = 0
        self._claim: Category | None = None
        self._claimed: list[tuple[_StorageRef, Category]] = []
        self._fresh = 0
        self.running = RunningModule()
        self._lines = UsersLines(self.running.above_calls)
        self._labels: dict[tuple[object, ...], Label] = {}

    def created(self, tensor: Tensor, op: str) -> None:
        """Log an allocation if `tensor`'s storage has not been seen."""
        self._seen(tensor.untyped_storage(), op, tensor)

    def _seen(self, storage: torch.UntypedStorage, op: str, tensor: Tensor | None = None) -> None:
        key = storage._cdata
        if key in self._live:
            return
        ref = _StorageRef(storage, self._freed)
        ref.key = key
        ref.block = len(self._blocks)
        self._live[key] = ref
        running = self._running
        module, where = self._maker() if running is None else (running.module, running.where)
        category = None if self._claim else self._pending
        is_forward = False
        if self._claim:
            self._claimed.append((ref, self._claim))
        elif category is None and self.phase == "backward" and torch.is_grad_enabled():
            if current_graph_task_id() >= 0:
                category = "activations"  # recomputed by activation checkpointing
            else:
                # of another loss, or the gradient that a backward pass begins with
                is_forward = True
        block = _Block(storage.nbytes(), self.phase, op, category, module, where)
        block.is_forward = is_forward
        if tensor is not None:
            block.shape, block.dtype = tensor.shape, tensor.dtype
        self._blocks.append(block)
        self._events.append(ref.block)
        self._latest = key
        if running is not None:
            running.results.append(len(self._events))

    def _maker(self) -> tuple[str, str]:
        """Return the module that is at work, and the line of the user's code that runs."""
        module = self.running.current
        if module is None:
            module = self.running.name()
        return module, self._lines.current() if has_users_line(self.phase) else ""

    def latest(self, tensor: Any) -> str | None:
        """Return the op that made a tensor, if no tensor was allocated since."""
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return None
        key = tensor.untyped_storage()._cdata
        ref = self._live.get(key) if key == self._latest else None
        return None if ref is None else self._blocks[ref.block].op.partition(".")[0]

    def _freed(self, ref: _StorageRef) -> None:
        # the address may have been reused by a storage that was seen before this callback ran
        if self._live.get(ref.key) is ref:
            del self._live[ref.key]
        self._events.append(~ref.block)

    def hidden(self, size_bytes: int, op: str, *, is_kept: bool = False) -> int:
        """Log an allocation that no tensor shows; return its number, to free it or not.

        What a library keeps for all that follows belongs to no module.
        """
        self._events.append(len(self._blocks))
        maker = ("", "") if is_kept else self._maker()
        self._blocks.append(_Block(size_bytes, self.phase, op, "workspace", *maker))
        return len(self._blocks) - 1

    def free(self, blocks: Iterable[int]) -> None:
        """Log that hidden allocations are given back."""
        self._events.extend(~block for block in blocks)

    def runs(self, kind: Hashable, name: str, numbers: tuple[int, ...], takes: Takes) -> None:
        """Note that a kernel begins that may take scratch; as in `Kernel`."""
        self._running = _Running(kind, name, numbers, takes, len(self._events), *self._maker())

    def ended(self) -> None:
        """Note that the kernel has run."""
        running = self._running
        assert running is not None
        self._running = None
        self._kernels.append(
            Kernel(
                kind=running.kind,
                name=running.name,
                phase=self.phase,
                stream=self.stream(),
                start=running.start,
                results=tuple(running.results),
                end=len(self._events),
                marks=len(self._marks),
                numbers=running.numbers,
                takes=running.takes,
                label=self._label(running.module, (), None, running.where),
            )
        )

    def stream(self) -> int:
        """Return the number of the current stream, 0 for the first."""
        return 0

    def begin(self, phase: Phase, window: int = 0, micro_batch: int = 0) -> None:
        """Mark the beginning of a phase."""
        if phase == "inputs":
            self._fresh = len(self._blocks)
        if phase == "backward":
            for ref in self._live.values():
                block = self._blocks[ref.block]
                block.outlived_forward = True
                # another forward pass after a step or a loss, as of a GAN's generator
                is_forward = block.is_forward or block.phase == "step"
                if is_forward and ref.block >= self._fresh and block.category is None:
                    block.category = "activations"
        self.phase = phase
        self._pending = "inputs" if phase == "inputs" else None
        self._marks.append(Mark(len(self._events), phase, window, micro_batch))

    def tag(self, owned: Iterable[tuple[Any, str | None]], category: Category) -> None:
        """Put the storages of tensors into a category for their whole life.

        Each comes with the module that owns it; None leaves it to the one that made it.
        """
        for tensor, owner in owned:
            for part in parts_of(tensor):
                if part.layout is not torch.strided:
                    continue
                ref = self._live.get(part.untyped_storage()._cdata)
                if ref is not None:
                    block = self._blocks[ref.block]
                    block.category = category
                    if owner is not None:
                        block.module = owner

    def claim(self, category: Category | None) -> None:
        """Remember of what is allocated from now on that it would be of a category, if kept."""
        self._claim = category

    def keep(self) -> None:
        """Put what was claimed, and is alive, into the category that it was claimed for."""
        for ref, category in self._claimed:
            block = self._blocks[ref.block]
            if self._live.get(ref.key) is ref and block.category is None:
                block.category = category
        self._claimed.clear()

    def extent(self) -> tuple[int, int]:
        """Return how many blocks and events there are."""
        return len(self._blocks), len(self._events)

    def in_registers(self, since: tuple[int, int], kept: Any) -> None:
        """Take what was made and freed since an extent for registers, which have no memory.

        Blocks of ops whose name the pattern `kept` finds are memory in any case.
        """
        first, start = since
        for block in {~event for event in self._events[start:] if event < 0}:
            if block >= first and not kept.search(self._blocks[block].op):
                self._blocks[block].size_bytes = 0

    def live_bytes(self) -> int:
        """Return the bytes that are allocated now."""
        sizes = [block.size_bytes for block in self._blocks]
        return running_bytes(sizes, self._events)[-1] if self._events else 0

    def trace(self, micro_batch: int, accumulation_steps: int) -> Trace:
        """Return what was seen so far, with what kernels took."""
        return with_scratch(self.bare(micro_batch, accumulation_steps))

    def bare(self, micro_batch: int, accumulation_steps: int) -> Bare:
        """Return what was seen so far, and apart from it the kernels that take scratch."""
        trace = Trace(
            micro_batch=micro_batch,
            accumulation_steps=accumulation_steps,
            blocks=tuple(
                Allocation(
                    b.size_bytes,
                    b.category or _by_phase(b),
                    b.phase,
                    b.op,
                    b.stream,
                    self._label(b.module, b.shape, b.dtype, b.where),
                )
                for b in self._blocks
            ),
            events=tuple(self._events),
            marks=tuple(self._marks),
            parts=self.parts,
        )
        return Bare(trace, tuple(self._kernels))

    def _label(
        self, module: str, shape: tuple[int, ...], dtype: torch.dtype | None, where: str
    ) -> Label:
        """Return a label; blocks with the same one share it."""
        key = (module, shape, dtype, where)
        known = self._labels.get(key)
        if known is None:
            name = "" if dtype is None else str(dtype).removeprefix("torch.")
            known = self._labels[key] = Label(module, tuple(shape), name, where)
        return known


def _by_phase(block: _Block) -> Category:
    """Return the category of a block without an owner: activations outlive their forward pass."""
    if block.phase == "setup":
        return "other"
    if block.phase == "forward" and block.outlived_forward:
        return "activations"
    return "temporaries"
