"""Snapshots of the caching allocator, made with `torch.cuda.memory._snapshot()`.

Invariant: loading executes nothing, because the unpickler knows no globals.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args

from autobatch.errors import FileError, UsageError
from autobatch.memory.allocator_settings import SIZE_CLASSES, AllocatorSettings
from autobatch.memory.blocks import DEFAULT_POOL, BlockInfo, BlockState, SegmentInfo

__all__ = ["Action", "Snapshot", "TraceEvent", "load_snapshot", "read_snapshot"]

Action = Literal[
    "alloc",
    "free_requested",
    "free_completed",
    "segment_alloc",
    "segment_free",
    "segment_map",
    "segment_unmap",
    "oom",
]
_ACTIONS = frozenset(get_args(Action))

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One recorded action; `size_bytes` of blocks is what was requested, not rounded.

    `pool_id` is the owner of the block or segment; recordings of older versions leave it out.
    """

    action: Action
    address: int
    size_bytes: int
    stream: int
    pool_id: tuple[int, int] = DEFAULT_POOL


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A recording: by device, the last state and the events that led to it."""

    segments: Mapping[int, tuple[SegmentInfo, ...]]
    traces: Mapping[int, tuple[TraceEvent, ...]]
    settings: AllocatorSettings


class _DataUnpickler(pickle.Unpickler):
    """Loads numbers, strings and containers, and refuses every global, so that nothing can run."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and a snapshot holds only data")


def load_snapshot(path: str | Path) -> Snapshot:
    """Load a pickle of `torch.cuda.memory._snapshot()` without running anything in it.

    Raises:
        FileError: unreadable, corrupt, hostile, or not a snapshot.
    """
    try:
        with open(path, "rb") as file:
            content = _DataUnpickler(file).load()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # a corrupt pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileError(f"{path} is not a snapshot that can be loaded: {reason}") from None
    try:
        return read_snapshot(content)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise FileError(
            f"{path} is not a memory snapshot: {reason}; make one with"
            " torch.cuda.memory._dump_snapshot()"
        ) from None


def read_snapshot(content: object) -> Snapshot:
    """Read what `torch.cuda.memory._snapshot()` returned.

    Raises:
        KeyError, TypeError, ValueError: it does not have the form of a snapshot.
    """
    top = _typed(content, dict, "the file")
    segments: dict[int, list[SegmentInfo]] = {}
    for record in _typed(top["segments"], list, "segments"):
        segment = _parse_segment(_typed(record, dict, "a segment"))
        segments.setdefault(_typed(record.get("device", 0), int, "device"), []).append(segment)
    traces = {
        device: tuple(_parse_events(_typed(trace, list, "a trace")))
        for device, trace in enumerate(_typed(top["device_traces"], list, "device_traces"))
    }
    settings = _parse_settings(_typed(top.get("allocator_settings", {}), dict, "the settings"))
    expands = any(segment.expandable for part in segments.values() for segment in part) or any(
        event.action == "segment_map" for trace in traces.values() for event in trace
    )
    if "allocator_settings" not in top:
        settings = replace(settings, expandable_segments=expands)
    elif not expands:  # asked for, but this platform had none
        settings = replace(settings, expandable_segments=False)
    return Snapshot(
        segments={device: tuple(part) for device, part in segments.items()},
        traces=traces,
        settings=settings,
    )


def _typed(value: object, kind: type[_T], name: str) -> _T:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__} instead of a {kind.__name__}")
    return value


def _parse_segment(record: dict[str, Any]) -> SegmentInfo:
    start = address = _typed(record["address"], int, "address")
    blocks = []
    for block in _typed(record["blocks"], list, "blocks"):
        size = _typed(block["size"], int, "size")
        state = _block_state(_typed(block["state"], str, "state"))
        requested = _typed(block.get("requested_size", size), int, "requested_size")
        blocks.append(
            BlockInfo(
                address=address,
                size_bytes=size,
                requested_bytes=0 if state == "free" else requested,
                state=state,
            )
        )
        if size <= 0 or _typed(block.get("address", address), int, "address") != address:
            raise ValueError(f"the blocks of the segment at {start:#x} do not tile it")
        address += size
    if not blocks or address - start != record["total_size"]:
        raise ValueError(f"the blocks of the segment at {start:#x} do not tile it")
    return SegmentInfo(
        address=start,
        size_bytes=address - start,
        stream=_typed(record.get("stream", 0), int, "stream"),
        small=record["segment_type"] == "small",
        pool_id=_pool_id(record.get("segment_pool_id", DEFAULT_POOL)),
        expandable=bool(record.get("is_expandable", False)),
        blocks=tuple(blocks),
    )


def _block_state(name: str) -> BlockState:
    if name == "active_allocated":
        return "allocated"
    return "awaiting_free" if name.startswith("active") else "free"


def _pool_id(value: object) -> tuple[int, int]:
    first, second = cast(Sequence[object], value)
    return _typed(first, int, "a pool id"), _typed(second, int, "a pool id")


def _parse_events(records: Sequence[object]) -> Iterator[TraceEvent]:
    for item in records:
        record = _typed(item, dict, "an event")
        if record["action"] in _ACTIONS:
            yield TraceEvent(
                record["action"],
                _typed(record.get("addr", 0), int, "addr"),
                _typed(record["size"], int, "size"),
                _typed(record.get("stream", 0), int, "stream"),
                _pool_id(record.get("pool_id", DEFAULT_POOL)),
            )


def _parse_settings(record: dict[str, Any]) -> AllocatorSettings:
    text = record.get("PYTORCH_CUDA_ALLOC_CONF") or record.get("PYTORCH_ALLOC_CONF") or ""
    try:
        settings = AllocatorSettings.parse(_typed(text, str, "PYTORCH_CUDA_ALLOC_CONF"))
    except UsageError:
        settings = AllocatorSettings()
    if "max_split_size" in record:
        limit = _typed(record["max_split_size"], int, "max_split_size")
        settings = replace(settings, max_split_size_bytes=limit if limit > 0 else None)
    if "expandable_segments" in record:
        settings = replace(settings, expandable_segments=bool(record["expandable_segments"]))
    if "garbage_collection_threshold" in record:
        threshold = float(record["garbage_collection_threshold"])
        settings = replace(settings, garbage_collection_threshold=threshold)
    if "roundup_power2_divisions" in record:
        table = _typed(record["roundup_power2_divisions"], dict, "roundup_power2_divisions")
        divisions = {int(key): _typed(value, int, "divisions") for key, value in table.items()}
        if any(divisions.get(size_class, 0) > 1 for size_class in SIZE_CLASSES):
            settings = replace(settings, roundup_power2_divisions=divisions)
    return settings
