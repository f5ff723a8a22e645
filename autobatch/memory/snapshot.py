"""Snapshots of the caching allocator, made with `torch.cuda.memory._snapshot()`.

Invariant: loading executes nothing, because the unpickler knows no globals.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, cast, get_args

from autobatch.errors import FileError, UsageError
from autobatch.memory.allocator_settings import SIZE_CLASSES, AllocatorSettings
from autobatch.memory.blocks import DEFAULT_POOL, BlockInfo, BlockState, SegmentInfo
from autobatch.support.units import format_bytes

__all__ = [
    "Action",
    "Annotation",
    "Frame",
    "Snapshot",
    "Stack",
    "TraceEvent",
    "load_snapshot",
    "read_snapshot",
]

Action = Literal[
    "alloc",
    "free_requested",
    "free_completed",
    "segment_alloc",
    "segment_free",
    "segment_map",
    "segment_unmap",
    "oom",
    "annotate",
]
_ACTIONS = frozenset(get_args(Action))

_T = TypeVar("_T")

_LIMIT = 1 << 63  # of sizes, times and stream ids; addresses have one bit more


class Frame(NamedTuple):
    """One line of a stack, of Python or of C++; C++ files are often not known and called `??`."""

    name: str
    filename: str
    line: int


Stack = tuple[Frame, ...]
"""The frames of one stack, innermost first."""


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One recorded action; `size_bytes` of blocks is what was requested, not rounded.

    `pool_id` is the owner of the block or segment; recordings of older versions leave it out.

    Attributes:
        device_free_bytes: what CUDA said was free when a request failed; None for other actions.
        time_us: microseconds since 1970; 0 where the recording does not tell.
        stack: where it happened; empty where that was not recorded, or not read.
        label: text that the user gave to the block or to all that was allocated then.
        category: what PyTorch's memory profiler took the block for, where it made the recording.
    """

    action: Action
    address: int
    size_bytes: int
    stream: int
    pool_id: tuple[int, int] = DEFAULT_POOL
    device_free_bytes: int | None = None
    time_us: int = 0
    stack: Stack = ()
    label: str = ""
    category: str = ""


@dataclass(frozen=True, slots=True)
class Annotation:
    """A span that PyTorch or the user named while recording; `end_us` is None where it is open."""

    name: str
    start_us: int
    end_us: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A recording: by device, the last state and the events that led to it.

    Attributes:
        settings: of the allocator.
        settings_text: PYTORCH_CUDA_ALLOC_CONF, as the process had it; empty where it had none.
        stacks: by device and address, where the blocks of the last state were allocated.
        annotations: by device, the named spans; both are empty unless they were asked for.
    """

    segments: Mapping[int, tuple[SegmentInfo, ...]]
    traces: Mapping[int, tuple[TraceEvent, ...]]
    settings: AllocatorSettings
    settings_text: str = ""
    stacks: Mapping[int, Mapping[int, Stack]] = field(default_factory=dict)
    annotations: Mapping[int, tuple[Annotation, ...]] = field(default_factory=dict)


class _DataUnpickler(pickle.Unpickler):
    """Loads numbers, strings and containers, and refuses every global, so that nothing can run."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and a snapshot holds only data")


def load_snapshot(
    path: str | Path, *, stacks: bool = False, limit_bytes: int | None = None
) -> Snapshot:
    """Load a pickle of `torch.cuda.memory._snapshot()` without running anything in it.

    Args:
        path: of the file.
        stacks: also read stacks, labels and annotations, which take time.
        limit_bytes: the largest file that is read; any if None.

    Raises:
        FileError: unreadable, larger than the limit, corrupt, hostile, or not a snapshot.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if limit_bytes is not None and size > limit_bytes:
                raise FileError(
                    f"{path} has {format_bytes(size)}, and at most {format_bytes(limit_bytes)} are"
                    " read: record less, with max_entries of _record_memory_history()"
                )
            content = _DataUnpickler(file).load()
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None
    except MemoryError:
        raise FileError(
            f"{path} is not a snapshot that can be loaded: it asks for more memory than there is"
        ) from None
    except Exception as error:  # a corrupt pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileError(f"{path} is not a snapshot that can be loaded: {reason}") from None
    try:
        return read_snapshot(content, stacks=stacks)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise FileError(
            f"{path} is not a memory snapshot: {reason}; make one with"
            " torch.cuda.memory._dump_snapshot()"
        ) from None


def read_snapshot(content: object, *, stacks: bool = False) -> Snapshot:
    """Read what `torch.cuda.memory._snapshot()` returned.

    Args:
        content: the returned object.
        stacks: also read stacks, labels and annotations, which take time.

    Raises:
        KeyError, TypeError, ValueError: it does not have the form of a snapshot.
    """
    top = _typed(content, dict, "the file")
    reader = _StackReader() if stacks else None
    segments: dict[int, list[SegmentInfo]] = {}
    block_stacks: dict[int, dict[int, Stack]] = {}
    for record in _typed(top["segments"], list, "segments"):
        segment = _parse_segment(_typed(record, dict, "a segment"))
        device = _whole(record.get("device", 0), "device")
        segments.setdefault(device, []).append(segment)
        if reader:
            known = block_stacks.setdefault(device, {})
            for info, block in zip(segment.blocks, record["blocks"], strict=True):
                if info.state != "free":
                    known[info.address] = reader.read(block.get("frames"))
    traces = {
        device: tuple(_parse_events(_typed(trace, list, "a trace"), reader))
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
        settings_text=_settings_text(top.get("allocator_settings", {})),
        stacks=block_stacks,
        annotations=_parse_annotations(top.get("external_annotations", [])) if reader else {},
    )


def _typed(value: object, kind: type[_T], name: str) -> _T:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__} instead of a {kind.__name__}")
    return value


def _whole(value: object, name: str, limit: int = _LIMIT) -> int:
    """Return a whole number that is not negative and below the limit."""
    number = _typed(value, int, name)
    if not 0 <= number < limit:
        raise ValueError(f"{name} is out of range")
    return number


class _StackReader:
    """Reads frames; PyTorch shares the lists and their entries, and so do the stacks here."""

    def __init__(self) -> None:
        self._stacks: dict[int, Stack] = {}
        self._frames: dict[int, Frame] = {}
        self._equal: dict[Stack, Stack] = {}

    def read(self, frames: object) -> Stack:
        """Return a list of frames as a stack; equal stacks are one object."""
        if not frames:
            return ()
        found = self._stacks.get(id(frames))
        if found is None:
            read = tuple(map(self._frame, _typed(frames, list, "the frames")))
            found = self._stacks[id(frames)] = self._equal.setdefault(read, read)
        return found

    def _frame(self, record: object) -> Frame:
        found = self._frames.get(id(record))
        if found is None:
            entry = _typed(record, dict, "a frame")
            found = self._frames[id(record)] = Frame(
                _typed(entry["name"], str, "the name of a frame"),
                _typed(entry["filename"], str, "the file of a frame"),
                max(_typed(entry["line"], int, "the line of a frame"), 0),
            )
        return found


def _parse_annotations(value: object) -> dict[int, tuple[Annotation, ...]]:
    found: dict[int, list[Annotation]] = {}
    for item in _typed(value, list, "external_annotations"):
        record = _typed(item, dict, "an annotation")
        name = _typed(record.get("name", ""), str, "the name of an annotation")
        time = _typed(record.get("time_us", 0), int, "the time of an annotation")
        spans = found.setdefault(_whole(record.get("device", 0), "device"), [])
        if record.get("stage") == "START":
            spans.append(Annotation(name, time, None))
            continue
        for index in range(len(spans) - 1, -1, -1):
            if spans[index].name == name and spans[index].end_us is None:
                spans[index] = Annotation(name, spans[index].start_us, time)
                break
    return {device: tuple(spans) for device, spans in found.items()}


def _parse_segment(record: dict[str, Any]) -> SegmentInfo:
    start = address = _whole(record["address"], "address", 2 * _LIMIT)
    blocks = []
    for block in _typed(record["blocks"], list, "blocks"):
        size = _whole(_typed(block, dict, "a block")["size"], "size")
        state = _block_state(_typed(block["state"], str, "state"))
        requested = _whole(block.get("requested_size", size), "requested_size")
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
        stream=_whole(record.get("stream", 0), "stream", 2 * _LIMIT),
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


def _parse_events(
    records: Sequence[object], reader: _StackReader | None = None
) -> Iterator[TraceEvent]:
    for item in records:
        record = _typed(item, dict, "an event")
        action = record["action"]
        if action not in _ACTIONS:
            continue
        free = record.get("device_free") if action == "oom" else None
        yield TraceEvent(
            action,
            _whole(record.get("addr", 0), "addr", 2 * _LIMIT),
            _whole(record["size"], "size"),
            _whole(record.get("stream", 0), "stream", 2 * _LIMIT),
            _pool_id(record.get("pool_id", DEFAULT_POOL)),
            None if free is None else _whole(free, "device_free"),
            *(_told(record, reader) if reader else ()),
        )


def _told(record: dict[str, Any], reader: _StackReader) -> tuple[int, Stack, str, str]:
    """Return time, stack, label and category of an event."""
    return (
        _typed(record.get("time_us", 0), int, "time_us"),
        reader.read(record.get("frames")),
        _typed(record.get("user_metadata", ""), str, "user_metadata"),
        _typed(record.get("category", ""), str, "category"),
    )


def _settings_text(record: dict[str, Any]) -> str:
    text = record.get("PYTORCH_CUDA_ALLOC_CONF") or record.get("PYTORCH_ALLOC_CONF") or ""
    return _typed(text, str, "PYTORCH_CUDA_ALLOC_CONF")


def _parse_settings(record: dict[str, Any]) -> AllocatorSettings:
    text = _settings_text(record)
    try:
        settings = AllocatorSettings.parse(text)
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
