"""A recorder of storages for one rank of several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.recorder import StorageRecorder
from autobatch.memory.trace import Trace

__all__ = ["RankRecorder"]


class RankRecorder(StorageRecorder):
    """A recorder that knows streams, storages that are resized, and tensors that are none.

    Buffers of collectives and gathered parameters are "temporaries", whichever phase makes them.
    """

    def __init__(self, stream: Callable[[], int]):
        """Record; `stream` tells the number of the current stream, 0 for the first."""
        super().__init__()
        self._stream = stream
        self._streams: dict[int, int] = {}
        self._emptied: set[int] = set()
        self._muted = False
        self._gathers = False

    def created(self, tensor: Tensor, op: str) -> None:
        """Log an allocation if `tensor`'s storage has not been seen."""
        if self._muted:
            return
        index = len(self._blocks)
        super().created(tensor, op)
        if index < len(self._blocks):
            if stream := self._stream():
                self._streams[index] = stream
            if self._gathers:
                self._blocks[index].category = "temporaries"

    def resized(self, storage: torch.UntypedStorage, resize: Callable[[], Any]) -> Any:
        """Resize a storage: to the allocator, its old memory goes and new memory comes."""
        ref = None if self._muted else self._live.pop(storage._cdata, None)
        if ref is None:
            return resize()
        old = self._blocks[ref.block]
        self._events.append(~ref.block)
        result = resize()
        index = len(self._blocks)
        self.created(_Storage(storage), old.op)  # type: ignore[arg-type]
        self._blocks[index].category = old.category
        if not self._blocks[index].size_bytes:
            self._emptied.add(index)
        return result

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Take no notice of what is made inside: it would exist nowhere."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """What is made inside serves a collective."""
        before, self._gathers = self._gathers, True
        try:
            yield
        finally:
            self._gathers = before

    def trace(self, micro_batch: int, accumulation_steps: int) -> Trace:
        """Return what was seen so far, without whole parameters on their way to shards."""
        whole = super().trace(micro_batch, accumulation_steps)
        blocks = list(whole.blocks)
        for index, stream in self._streams.items():
            blocks[index] = replace(blocks[index], stream=stream)
        start = next((mark.event for mark in whole.marks if mark.phase != "setup"), 0)
        passing = {~event for event in whole.events[:start] if event < 0}
        return _without(replace(whole, blocks=tuple(blocks)), passing | self._emptied)


class _Storage:
    """What a recorder asks of a tensor."""

    def __init__(self, storage: torch.UntypedStorage):
        self._storage = storage

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._storage


def _without(trace: Trace, left_out: set[int]) -> Trace:
    """Leave blocks out of a trace."""
    number: dict[int, int] = {}
    for index in range(len(trace.blocks)):
        if index not in left_out:
            number[index] = len(number)
    events: list[int] = []
    places = [0]
    for event in trace.events:
        index = event if event >= 0 else ~event
        if index in number:
            events.append(number[index] if event >= 0 else ~number[index])
        places.append(len(events))
    return replace(
        trace,
        blocks=tuple(trace.blocks[index] for index in number),
        events=tuple(events),
        marks=tuple(replace(mark, event=places[mark.event]) for mark in trace.marks),
    )
