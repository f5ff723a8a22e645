"""Reads a recorded memory snapshot: who held the peak, what was lost, what else would do."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path

from autobatch.errors import UsageError
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.blocks import (
    DEFAULT_POOL,
    SMALL_SEGMENT_BYTES,
    BlockInfo,
    SegmentInfo,
    round_size,
    segment_size,
)
from autobatch.memory.history import history_of
from autobatch.memory.holdings import Life, classify, lives_of
from autobatch.memory.recorded_run import RecordedRun
from autobatch.memory.recording import Recording, rewind
from autobatch.memory.snapshot import Snapshot, TraceEvent, load_snapshot
from autobatch.memory.stacks import origin_of
from autobatch.memory.what_if import Outcome, releases, rerun
from autobatch.records.explanation import (
    Alternative,
    Basis,
    DeviceExplanation,
    ExplanationRecord,
    Held,
    History,
    LargeBlock,
    Moment,
    Place,
    Replay,
    Reserve,
    Shortage,
)
from autobatch.support.units import GIB, format_bytes
from autobatch.support.wording import count, given, listed

__all__ = ["explain_snapshot", "load_for_explanation"]

_TRIED = (
    "expandable_segments:True",
    "max_split_size_mb:128",
    "max_split_size_mb:512",
    "roundup_power2_divisions:4",
    "roundup_power2_divisions:16",
)
_MOST_FILE_BYTES = 8 * GIB


def load_for_explanation(path: str | Path) -> Snapshot:
    """Load a snapshot with its stacks, without running anything in it.

    Raises:
        FileError: unreadable, corrupt, hostile, too large, or not a snapshot.
    """
    return load_snapshot(path, stacks=True, limit_bytes=_MOST_FILE_BYTES)


def explain_snapshot(
    snapshot: Snapshot,
    source: str,
    *,
    device: int | None = None,
    settings: Iterable[str] = (),
    top: int = 10,
) -> ExplanationRecord:
    """Explain a snapshot that was read with its stacks.

    Args:
        snapshot: what was recorded.
        source: what to call it.
        device: the only one to explain; all that show anything if None.
        settings: texts of PYTORCH_CUDA_ALLOC_CONF to try, beside the usual ones.
        top: how many of the largest blocks to name; those alike count once.

    Raises:
        UsageError: nothing was recorded of the device, or PyTorch would refuse a setting.
    """
    shown = sorted(
        {index for index, trace in snapshot.traces.items() if trace} | set(snapshot.segments)
    )
    if device is not None and (not _is_whole(device) or device not in shown):
        names = listed([str(index) for index in shown], 8) or "none"
        raise UsageError(f"{source} shows nothing of {given('device', device)}: it shows {names}")
    if not shown:
        raise UsageError(
            f"{source} shows no memory of any device: record with"
            " torch.cuda.memory._record_memory_history() before the step, and dump after it"
        )
    if not _is_whole(top) or top < 1:
        raise UsageError(f"{given('top', top)} shows nothing: give a number of blocks, at least 1")
    texts = list(settings) if isinstance(settings, Iterable) else [settings]
    if wrong := [each for each in texts if not isinstance(each, str)]:
        raise UsageError(
            f"settings holds a {type(wrong[0]).__name__}: give texts such as max_split_size_mb:256"
        )
    tried = [(text, AllocatorSettings.parse(text).require_known()) for text in texts]
    return ExplanationRecord(
        source=source,
        devices=tuple(
            _Device(snapshot, index, top).explain(tried)
            for index in shown
            if device is None or index == device
        ),
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class _Device:
    """The explanation of one device in the making."""

    def __init__(self, snapshot: Snapshot, device: int, top: int) -> None:
        self.snapshot = snapshot
        self.device = device
        self.top = top
        self.final = snapshot.segments.get(device, ())
        self.settings = snapshot.settings
        self.recording: Recording = rewind(snapshot, device)
        self.events = self.recording.events
        self.released = releases(self.recording)
        self.notes: list[str] = []

    def explain(self, tried: Sequence[tuple[str, AllocatorSettings]]) -> DeviceExplanation:
        annotations = self.snapshot.annotations.get(self.device, ())
        stacks = self.snapshot.stacks.get(self.device, {})
        lives = lives_of(self.recording, stacks, annotations)
        purposes = classify(lives, self.events)
        run = _Walk(self.recording, self.settings)
        moment: Moment = "peak" if self.events else "end"
        segments = run.segments_at(run.peak_event) if self.events else self.final
        at = run.peak_event if self.events else len(self.events) - 1
        alive = [
            (life, purpose)
            for life, purpose in zip(lives, purposes, strict=True)
            if (life.born is None or life.born <= at) and (life.freed is None or life.freed > at)
        ]
        blocks = _blocks_in_use(segments)
        held = _held(alive)
        reserve = _reserve(segments, self.settings)
        shortage = self._shortage(run)
        released = Counter(self.released.values())
        retries = released["allocator"]
        if released["either"]:
            self.notes.append(
                f"cached memory was given back {count(released['either'], 'time')} by"
                " torch.cuda.empty_cache(), or because a request found no memory: the recording"
                " does not tell, and the simulation takes it for the former"
            )
        capacity = None
        if shortage or retries:  # what the GPU gave then, as far as that is known
            capacity = max(run.peak_reserved, shortage.limit_bytes if shortage else 0)
        self._note_what_is_missing(lives)
        return DeviceExplanation(
            device=self.device,
            settings=self.snapshot.settings_text,
            moment=moment,
            events=len(self.events),
            moment_event=at if self.events and at >= 0 else None,
            moment_where=", ".join(filter(None, _origin_of(self.events[at]))) if at >= 0 else "",
            reserve=reserve,
            peak_reserved_bytes=max(run.peak_reserved, reserve.reserved_bytes),
            alloc_retries=retries,
            held=held,
            places=_places(alive),
            largest=_largest(alive, blocks, at, self.top),
            replay=self._replay(run, capacity) if self.events else None,
            alternatives=self._alternatives(capacity, shortage, tried) if self.events else (),
            starts_empty=not _blocks_in_use(self.recording.start),
            shortage=shortage,
            history=self._history(lives, purposes, run) if self.events else None,
            notes=tuple(self.notes),
        )

    def _replay(self, run: _Walk, capacity: int | None) -> Replay:
        free = rerun(
            self.recording,
            self.settings,
            released=self.released,
            start=self.recording.start,
            capacity_bytes=capacity,
        )
        difference = run.run.first_difference
        if difference is None and free.peak_reserved_bytes != run.peak_reserved:
            difference = "the allocator released segments at other times than recorded"
        return Replay(
            requests=run.run.blocks,
            requests_matched=run.run.blocks_matched,
            ties=run.run.ties,
            recorded_reserved_bytes=run.peak_reserved,
            replayed_reserved_bytes=free.peak_reserved_bytes,
            first_difference=difference,
        )

    def _history(
        self, lives: Sequence[Life], purposes: Sequence[tuple[str, Basis]], run: _Walk
    ) -> History:
        named = [(life, name) for life, (name, _) in zip(lives, purposes, strict=True)]
        return history_of(named, run.allocated, run.reserved)

    def _shortage(self, run: _Walk) -> Shortage | None:
        failed = [index for index, event in enumerate(self.events) if event.action == "oom"]
        if not failed:
            return None
        index = failed[-1]
        event = self.events[index]
        reserve = _reserve(run.segments_at(index), self.settings)
        new_bytes = self._new_segment_bytes(event)
        free = event.device_free_bytes
        by_process = free is not None and free >= new_bytes
        if free is None:  # no more than what it once had is sure
            limit = max(run.peak_reserved, reserve.reserved_bytes)
        elif by_process:
            limit = reserve.reserved_bytes + new_bytes - 1
        else:
            limit = reserve.reserved_bytes + free
        where = _origin_of(event)
        return Shortage(
            requested_bytes=event.size_bytes,
            event=index,
            events_after=len(self.events) - 1 - index,
            where=where[0],
            operator=where[1],
            reserve=reserve,
            device_free_bytes=free,
            limit_bytes=limit,
            limited_by_process=by_process,
        )

    def _new_segment_bytes(self, event: TraceEvent) -> int:
        size = round_size(event.size_bytes, self.settings.divisions(event.size_bytes))
        return segment_size(size, self.settings.large_segment_bytes)

    def _alternatives(
        self,
        capacity: int | None,
        shortage: Shortage | None,
        tried: Sequence[tuple[str, AllocatorSettings]],
    ) -> tuple[Alternative, ...]:
        others = [(text, AllocatorSettings.parse(text)) for text in _TRIED]
        rows = [(self.snapshot.settings_text, self.settings, True)]
        known = [replace(self.settings, unknown=())]
        for text, settings in (("", AllocatorSettings()), *others, *tried):
            plain = replace(settings, unknown=())
            if plain not in known or (text, settings) in tried:
                known.append(plain)
                rows.append((text, settings, False))
        return tuple(
            self._alternative(text, settings, recorded, capacity, shortage)
            for text, settings, recorded in rows
        )

    def _alternative(
        self,
        text: str,
        settings: AllocatorSettings,
        recorded: bool,
        capacity: int | None,
        shortage: Shortage | None,
    ) -> Alternative:
        outcome: Outcome = rerun(
            self.recording, settings, released=self.released, capacity_bytes=capacity
        )
        meets = None
        if shortage is not None:
            reached = outcome.failed_event is None or outcome.failed_event > shortage.event
            meets = reached and shortage.event not in outcome.refused
        notes = []
        if settings.garbage_collection_threshold:
            notes.append(
                "garbage_collection_threshold acts only below a limit that the process sets"
                " itself; none is recorded, so it is left out"
            )
        if settings.unknown:
            notes.append(f"not of this allocator: {listed(settings.unknown, 3)}")
        return Alternative(
            settings=text,
            recorded=recorded,
            peak_reserved_bytes=outcome.peak_reserved_bytes,
            peak_allocated_bytes=outcome.peak_allocated_bytes,
            alloc_retries=outcome.alloc_retries,
            failed=outcome.failed_event is not None,
            meets_failed_request=meets,
            note="; ".join(notes),
        )

    def _note_what_is_missing(self, lives: Sequence[Life]) -> None:
        recording = self.recording
        if not self.events and not recording.skipped:
            self.notes.append(
                "the snapshot holds no events of this device, so there is no peak to explain and"
                " nothing to replay: this is its final state. Call"
                " torch.cuda.memory._record_memory_history() before the step"
            )
        if recording.contradiction:
            self.notes.append(
                f"{count(recording.skipped, 'event')} at the beginning could not be placed and"
                f" {'is' if recording.skipped == 1 else 'are'} left out: {recording.contradiction}"
                + ("" if self.events else "; nothing is left to replay: this is the final state")
            )
        older = [life for life in lives if life.born is None and not life.has_stack]
        if older and self.events:
            size = format_bytes(sum(life.requested_bytes for life in older))
            self.notes.append(
                f"{size} in {count(len(older), 'block')} {'was' if len(older) == 1 else 'were'}"
                " there before the recording, without a stack: to have parameters and optimizer"
                " state named, record from the beginning of the program"
            )
        born = [life for life in lives if life.born is not None]
        silent = sum(not life.has_stack for life in born)
        if silent:
            self.notes.append(
                f"{count(silent, 'block')} of {len(born):,} came without a stack: PyTorch's"
                " backward pass has no Python line, and is named where C++ stacks are recorded:"
                " torch.cuda.memory._record_memory_history(stacks='all')"
            )


class _Walk:
    """A recording, replayed step by step as it was recorded: what was reserved, and the peak."""

    def __init__(self, recording: Recording, settings: AllocatorSettings) -> None:
        self._recording = recording
        self._settings = settings
        self.run = RecordedRun(recording, settings)
        allocator = self.run.allocator
        self.allocated: list[int] = []  # after each event
        self.reserved: list[int] = []
        self.peak_event = -1
        self.peak_allocated = allocator.allocated_bytes
        self.peak_reserved = sum(part.size_bytes for part in recording.start)
        for index, event in enumerate(recording.events):
            self.run.step(recording.skipped + index, event)
            allocator = self.run.allocator
            if allocator.allocated_bytes > self.peak_allocated:
                self.peak_allocated, self.peak_event = allocator.allocated_bytes, index
            self.allocated.append(allocator.allocated_bytes)
            self.reserved.append(allocator.reserved_bytes)
        self.peak_reserved = max((self.peak_reserved, *self.reserved))

    def segments_at(self, event: int) -> tuple[SegmentInfo, ...]:
        """Return the state after an event; before the first one it is -1."""
        run = RecordedRun(self._recording, self._settings)
        for index in range(event + 1):
            run.step(self._recording.skipped + index, self._recording.events[index])
        return run.allocator.segments()


def _origin_of(event: TraceEvent) -> tuple[str, str]:
    found = origin_of(event.stack)
    return found.where, found.operator


def _blocks_in_use(segments: Sequence[SegmentInfo]) -> dict[int, BlockInfo]:
    return {
        block.address: block
        for part in segments
        for block in part.blocks
        if block.state == "allocated"
    }


def _reserve(segments: Sequence[SegmentInfo], settings: AllocatorSettings) -> Reserve:
    totals: Counter[str] = Counter()
    largest = free_blocks = 0
    for part in segments:
        for block in part.blocks:
            state = block.state
            totals[state] += block.size_bytes
            if state == "allocated":
                totals["rounding"] += block.size_bytes - block.requested_bytes
            elif state == "free" and part.pool_id != DEFAULT_POOL:
                totals["private"] += block.size_bytes
            elif state == "free":
                free_blocks += 1
                largest = max(largest, block.size_bytes)
                whole = _releasable(part, block, settings)
                totals["whole"] += whole
                totals["split"] += block.size_bytes - whole
    return Reserve(
        reserved_bytes=sum(part.size_bytes for part in segments),
        allocated_bytes=totals["allocated"],
        awaiting_bytes=totals["awaiting_free"],
        split_bytes=totals["split"],
        whole_bytes=totals["whole"],
        private_bytes=totals["private"],
        largest_free_bytes=largest,
        free_blocks=free_blocks,
        rounding_bytes=totals["rounding"],
    )


def _releasable(part: SegmentInfo, block: BlockInfo, settings: AllocatorSettings) -> int:
    """Return how much of a free block can be given back: a whole segment, or whole pages."""
    if not part.expandable:
        return block.size_bytes if len(part.blocks) == 1 else 0
    page = SMALL_SEGMENT_BYTES if part.small else settings.large_segment_bytes
    offset = block.address - part.address
    first = -(-offset // page) * page
    last = (offset + block.size_bytes) // page * page
    return max(last - first, 0)


_Alive = Sequence[tuple[Life, tuple[str, Basis]]]


def _held(alive: _Alive) -> tuple[Held, ...]:
    sizes: Counter[tuple[str, Basis]] = Counter()
    blocks: Counter[tuple[str, Basis]] = Counter()
    for life, purpose in alive:
        sizes[purpose] += life.requested_bytes
        blocks[purpose] += 1
    return tuple(
        Held(category=purpose[0], basis=purpose[1], size_bytes=size, blocks=blocks[purpose])
        for purpose, size in sizes.most_common()
    )


def _places(alive: _Alive) -> tuple[Place, ...]:
    found: defaultdict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for life, (category, _) in alive:
        found[life.origin.where, life.origin.operator, life.label, category].append(
            life.requested_bytes
        )
    places = [
        Place(
            where=where,
            operator=operator,
            label=label,
            category=category,
            size_bytes=sum(sizes),
            blocks=len(sizes),
        )
        for (where, operator, label, category), sizes in found.items()
    ]
    return tuple(sorted(places, key=lambda place: -place.size_bytes))


_Alike = tuple[int, tuple[str, Basis], tuple[str, str, str], bool]


def _largest(
    alive: _Alive, blocks: dict[int, BlockInfo], moment: int, most: int
) -> tuple[LargeBlock, ...]:
    """Name the largest blocks, those alike once: `most` of them would hide all the others."""
    groups: defaultdict[_Alike, list[Life]] = defaultdict(list)
    for life, purpose in alive:
        place = (life.origin.where, life.origin.operator, life.label)
        groups[life.requested_bytes, purpose, place, life.born is None].append(life)
    ranked = sorted(groups.items(), key=lambda group: -group[0][0])[:most]
    return tuple(_alike(lives, purpose, blocks, moment) for (_, purpose, *_), lives in ranked)


def _alike(
    lives: Sequence[Life], purpose: tuple[str, Basis], blocks: dict[int, BlockInfo], moment: int
) -> LargeBlock:
    """Return the oldest of some blocks that are alike."""
    oldest = min(lives, key=lambda life: -1 if life.born is None else life.born)
    return LargeBlock(
        blocks=len(lives),
        address=oldest.address,
        stream=oldest.stream,
        requested_bytes=oldest.requested_bytes,
        size_bytes=blocks[oldest.address].size_bytes,
        age_events=None if oldest.born is None else moment - oldest.born,
        category=purpose[0],
        basis=purpose[1],
        where=oldest.origin.where,
        operator=oldest.origin.operator,
        label=oldest.label,
    )
