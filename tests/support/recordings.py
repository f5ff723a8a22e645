"""Recordings of the caching allocator, made by the simulation itself."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from autobatch.memory.allocator import CachingAllocator, OutOfMemory
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.blocks import SegmentInfo
from autobatch.memory.segments import Block
from autobatch.memory.snapshot import Snapshot, load_snapshot
from autobatch.support.units import MIB

EXPANDABLE = AllocatorSettings(expandable_segments=True)
PRIVATE = (0, 3)


class Recorder(CachingAllocator):
    """An allocator that writes down what PyTorch would write down."""

    def record(self) -> None:
        """Start recording from here; peaks, too."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes
        self.events: list[dict[str, Any]] = []

    def note(
        self, action: str, address: int, size: int, stream: int, pool_id: tuple[int, int]
    ) -> None:
        self.events.append(
            {
                "action": action,
                "addr": address,
                "size": size,
                "stream": stream,
                "pool_id": pool_id,
                "time_us": 0,
            }
        )

    def alloc(self, size: int, stream: int = 0, pool_id: tuple[int, int] = (0, 0)) -> Block:
        self.owner = (stream, pool_id)
        try:
            block = self.malloc(size, stream, pool_id)
        except OutOfMemory:
            self.note("oom", 0, size, stream, pool_id)
            raise
        self.note("alloc", block.address, size, stream, pool_id)
        return block

    def cuda_malloc(self, size_bytes: int) -> int | None:
        address = super().cuda_malloc(size_bytes)
        if address is not None:
            self.note("segment_alloc", address, size_bytes, *self.owner)
        return address

    def cuda_map(self, address: int, size_bytes: int) -> bool:
        mapped = super().cuda_map(address, size_bytes)
        if mapped:
            self.note("segment_map", address, size_bytes, *self.owner)
        return mapped

    def free(self, block: Block) -> None:
        size = block.requested_bytes
        self.note("free_requested", block.address, size, block.pool.stream, block.pool.pool_id)
        self.request_free(block)
        if not block.shared:
            self.complete_free(block)

    def complete_free(self, block: Block) -> None:
        size = block.requested_bytes
        self.note("free_completed", block.address, size, block.pool.stream, block.pool.pool_id)
        super().complete_free(block)

    def release(self, block: Block) -> tuple[int, int]:
        action = "segment_free" if block.base is None else "segment_unmap"
        owner = (block.pool.stream, block.pool.pool_id)
        address, size = super().release(block)
        if size:
            self.note(action, address, size, *owner)
        return address, size

    def dump(self) -> dict[str, Any]:
        """Return what `torch.cuda.memory._snapshot()` would."""
        return {
            "segments": [segment_record(part) for part in self.segments()],
            "device_traces": [list(self.events)],
            "allocator_settings": {
                "max_split_size": self.settings.max_split_size_bytes or -1,
                "expandable_segments": self.settings.expandable_segments,
                "garbage_collection_threshold": 0.0,
                "roundup_power2_divisions": {
                    str(1 << power): self.settings.divisions(MIB << power) for power in range(16)
                },
                "a_setting_of_the_future": object,
            },
        }


def segment_record(part: SegmentInfo) -> dict[str, Any]:
    states = {
        "free": "inactive",
        "allocated": "active_allocated",
        "awaiting_free": "active_pending_free",
    }
    return {
        "device": 0,
        "address": part.address,
        "total_size": part.size_bytes,
        "stream": part.stream,
        "segment_type": "small" if part.small else "large",
        "segment_pool_id": part.pool_id,
        "is_expandable": part.expandable,
        "blocks": [
            {
                "address": block.address,
                "size": block.size_bytes,
                "requested_size": block.requested_bytes,
                "state": states[block.state],
            }
            for block in part.blocks
        ],
    }


def recorder(settings: AllocatorSettings | None = None, capacity: int | None = None) -> Recorder:
    made = Recorder(settings, capacity_bytes=capacity)
    made.record()
    return made


def plain(content: dict[str, Any]) -> dict[str, Any]:
    """Leave out what only a hostile file would hold."""
    kept = dict(content["allocator_settings"])
    kept.pop("a_setting_of_the_future")
    return {**content, "allocator_settings": kept}


def write(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path


def loaded(folder: Path, made: Recorder) -> Snapshot:
    return load_snapshot(write(folder / "recording.pickle", plain(made.dump())))
