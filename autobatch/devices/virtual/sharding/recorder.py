"""The trace of one rank of several: streams, resized storages, buffers of collectives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.recorder import StorageRecorder
from autobatch.memory.trace import Bare
from autobatch.support.patching import patched

__all__ = ["RankRecorder"]


class RankRecorder(StorageRecorder):
    """A storage recorder that knows what FSDP2 does.

    It tells the stream of every block and follows storages that are resized. Buffers of collectives
    and gathered parameters are "temporaries", whichever phase makes them.
    """

    def __init__(self, stream: Callable[[], int]):
        """Record; `stream` tells the number of the current stream, 0 for the first."""
        super().__init__()
        self._current_stream = stream
        self._emptied: set[int] = set()
        self.is_muted = False
        self._is_gathering = False

    def _seen(self, storage: torch.UntypedStorage, op: str, tensor: Tensor | None = None) -> None:
        if self.is_muted:
            return
        index = len(self._blocks)
        super()._seen(storage, op, tensor)
        if index < len(self._blocks):
            self._blocks[index].stream = self.stream()
            if self._is_gathering:
                self._blocks[index].category = "temporaries"

    def stream(self) -> int:
        """Return the number of the current stream."""
        return self._current_stream()

    def resized(self, storage: torch.UntypedStorage, resize: Callable[[], Any]) -> Any:
        """Resize a storage by `resize`: the allocator frees its old memory, then allocates anew."""
        ref = None if self.is_muted else self._live.pop(storage._cdata, None)
        if ref is None:
            return resize()
        old = self._blocks[ref.block]
        self._events.append(~ref.block)
        result = resize()
        index = len(self._blocks)
        self._seen(storage, old.op)
        new = self._blocks[index]
        new.category, new.module = old.category, old.module
        new.shape, new.dtype, new.where = old.shape, old.dtype, old.where
        if not new.size_bytes:
            self._emptied.add(index)
        return result

    def muted(self) -> AbstractContextManager[None]:
        """Take no notice of what is made inside: on a real rank it has no memory."""
        return patched(self, is_muted=True)

    def gathering(self) -> AbstractContextManager[None]:
        """Take what is made inside for buffers of a collective."""
        return patched(self, _is_gathering=True)

    def bare(self, micro_batch: int, accumulation_steps: int) -> Bare:
        """Return what was seen so far, without the whole parameters that were sharded in setup."""
        whole = super().bare(micro_batch, accumulation_steps)
        marks, events = whole.trace.marks, whole.trace.events
        start = next((mark.event for mark in marks if mark.phase != "setup"), 0)
        freed_in_setup = {~event for event in events[:start] if event < 0}
        return _without(whole, freed_in_setup | self._emptied)


def _without(whole: Bare, left_out: set[int]) -> Bare:
    """Leave blocks out of a trace, and number the others anew."""
    trace = whole.trace
    kept = [index for index in range(len(trace.blocks)) if index not in left_out]
    number = {index: new for new, index in enumerate(kept)}
    events: list[int] = []
    places = [0]  # of each event: how many of those that are kept came before it
    for event in trace.events:
        index = event if event >= 0 else ~event
        if index in number:
            events.append(number[index] if event >= 0 else ~number[index])
        places.append(len(events))
    left = replace(
        trace,
        blocks=tuple(trace.blocks[index] for index in kept),
        events=tuple(events),
        marks=tuple(replace(mark, event=places[mark.event]) for mark in trace.marks),
    )
    kernels = (
        replace(
            kernel,
            start=places[kernel.start],
            results=tuple(places[place] for place in kernel.results),
            end=places[kernel.end],
        )
        for kernel in whole.kernels
    )
    return Bare(left, tuple(kernels))
