"""Loading, rewinding and replaying recordings, on recordings made by the simulation itself."""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autobatch.errors import FileError
from autobatch.memory.allocator import Block, CachingAllocator, OutOfMemory
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.blocks import SegmentInfo
from autobatch.memory.recording import rewind
from autobatch.memory.snapshot import Snapshot, TraceEvent, load_snapshot
from autobatch.support.units import MIB
from reports.allocator.__main__ import main
from reports.allocator.replay import Score, replay

EXPANDABLE = AllocatorSettings(expandable_segments=True)
PRIVATE = (0, 3)


class Recorder(CachingAllocator):
    """An allocator that writes down what PyTorch would write down."""

    def record(self) -> None:
        """Start recording from here."""
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


def scored(folder: Path, made: Recorder) -> Score:
    snapshot = loaded(folder, made)
    recording = rewind(snapshot, 0)
    assert recording.contradiction is None
    return replay(recording, snapshot.segments.get(0, ()), snapshot.settings)


def test_a_snapshot_loads_as_typed_records(tmp_path: Path) -> None:
    made = recorder(AllocatorSettings(max_split_size_bytes=64 * MIB))
    made.alloc(1000)
    made.alloc(3 * MIB, 7)
    snapshot = loaded(tmp_path, made)
    assert snapshot.segments == {0: made.segments()}
    assert snapshot.settings.max_split_size_bytes == 64 * MIB
    assert [event.action for event in snapshot.traces[0]] == ["segment_alloc", "alloc"] * 2
    assert snapshot.traces[0][3] == TraceEvent("alloc", snapshot.traces[0][2].address, 3 * MIB, 7)


def test_an_allocator_starts_from_a_snapshot(tmp_path: Path) -> None:
    made = recorder()
    made.free(made.alloc(20 * MIB))
    made.alloc(MIB)
    snapshot = loaded(tmp_path, made)
    allocator = CachingAllocator.from_segments(
        snapshot.segments[0], snapshot.settings, capacity_bytes=22 * MIB
    )
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (22 * MIB, MIB)
    allocator.malloc(20 * MIB)
    assert allocator.alloc_retries == 0


def test_old_snapshots_without_addresses_and_settings_load(tmp_path: Path) -> None:
    made = recorder()
    made.alloc(MIB)
    content = made.dump()
    del content["allocator_settings"]
    for part in content["segments"]:
        del part["segment_pool_id"], part["is_expandable"]
        for block in part["blocks"]:
            del block["address"]
    snapshot = load_snapshot(write(tmp_path / "old.pickle", content))
    assert snapshot.segments == {0: made.segments()}
    assert snapshot.settings == AllocatorSettings()


class Bomb:
    """Would run a command when unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.flag,))


def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    flag = tmp_path / "was_here"
    path = write(tmp_path / "hostile.pickle", {"segments": [Bomb(flag)], "device_traces": []})
    with pytest.raises(FileError, match="only data"):
        load_snapshot(path)
    assert not flag.exists()


def test_even_a_harmless_global_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "global.pickle", recorder().dump())
    with pytest.raises(FileError, match=r"builtins\.object"):
        load_snapshot(path)


@given(cut=st.integers(0, 400), noise=st.binary(max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_gives_one_line(tmp_path: Path, cut: int, noise: bytes) -> None:
    made = recorder()
    made.alloc(MIB)
    content = pickle.dumps(plain(made.dump()))
    path = tmp_path / "damaged.pickle"
    path.write_bytes(content[:cut] + noise + content[cut + len(noise) + 1 :])
    try:
        load_snapshot(path)
    except FileError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)


def broken_snapshots() -> dict[str, object]:
    made = recorder()
    made.alloc(MIB)
    content = plain(made.dump())
    part = content["segments"][0]
    return {
        "a list": [],
        "no segments": {"device_traces": []},
        "segments of another type": {**content, "segments": {}},
        "a segment without address": {
            **content,
            "segments": [{key: value for key, value in part.items() if key != "address"}],
        },
        "blocks that do not fill": {**content, "segments": [{**part, "total_size": 5}]},
        "no blocks": {**content, "segments": [{**part, "blocks": []}]},
        "a trace of numbers": {**content, "device_traces": [[1]]},
        "sizes in words": {
            **content,
            "device_traces": [[{"action": "alloc", "addr": 0, "size": "1"}]],
        },
        "a pool id of one": {**content, "segments": [{**part, "segment_pool_id": 1}]},
        "settings in words": {**content, "allocator_settings": "default"},
    }


@pytest.mark.parametrize("kind", broken_snapshots())
def test_a_file_of_another_structure_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "broken.pickle", broken_snapshots()[kind])
    with pytest.raises(FileError, match="not a memory snapshot") as caught:
        load_snapshot(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot read .*nothing\.pickle: No such file"):
        load_snapshot(tmp_path / "nothing.pickle")


def test_rewinding_gives_the_state_before_the_trace(tmp_path: Path) -> None:
    made = recorder()
    kept, freed = made.alloc(3 * MIB), made.alloc(11 * MIB)
    start = made.segments()
    made.record()
    made.free(freed)
    made.alloc(2 * MIB)
    made.free(kept)
    made.empty_cache()
    assert rewind(loaded(tmp_path, made), 0).start == start


def test_rewinding_finds_how_far_a_block_reached_beyond_its_request(tmp_path: Path) -> None:
    made = recorder()
    made.free(made.alloc(40 * MIB))
    first, second = made.alloc(20 * MIB), made.alloc(20 * MIB)
    made.free(first)
    unsplit = made.alloc(19 * MIB + 512)
    assert unsplit.size_bytes == 20 * MIB
    made.free(second)
    start = made.segments()
    made.record()
    made.alloc(10 * MIB)  # behind the unsplit block, whose size nothing else shows
    made.free(unsplit)
    recording = rewind(loaded(tmp_path, made), 0)
    assert recording.start == start
    assert scored(tmp_path, made).agrees


def test_rewinding_stops_where_events_are_missing(tmp_path: Path) -> None:
    made = recorder()
    for size in (1, 2, 3):
        made.alloc(size * MIB)
    content = plain(made.dump())
    trace = content["device_traces"][0]
    assert [event["action"] for event in trace[2:4]] == ["segment_alloc", "alloc"]
    trace.insert(4, {**trace[3], "action": "free_completed"})  # freed, and yet there at the end
    recording = rewind(load_snapshot(write(tmp_path / "gap.pickle", content)), 0)
    assert recording.contradiction is not None
    assert "event 4 (free_completed of 2097152 B" in recording.contradiction
    assert (recording.skipped, len(recording.events)) == (5, 1)


def test_a_trace_after_which_allocations_went_unrecorded_is_inconsistent(tmp_path: Path) -> None:
    made = recorder()
    block = made.alloc(5 * MIB)
    content = plain(made.dump())
    made.free(block)
    content["segments"] = [segment_record(part) for part in made.segments()]
    recording = rewind(load_snapshot(write(tmp_path / "stale.pickle", content)), 0)
    assert recording.contradiction is not None
    assert "no block lives there" in recording.contradiction


def test_a_replay_counts_blocks_segments_and_releases(tmp_path: Path) -> None:
    made = recorder()
    block = made.alloc(3 * MIB)
    made.alloc(100)
    made.free(block)
    made.empty_cache()
    score = scored(tmp_path, made)
    assert (score.blocks, score.segments, score.releases) == (2, 2, 1)
    assert score.reserved_bytes == (2 * MIB, 2 * MIB)
    assert score.allocated_bytes == (512, 512)
    assert score.agrees


def test_a_replay_finds_a_worse_choice_and_goes_on_from_the_recorded_state(tmp_path: Path) -> None:
    made = recorder()
    for block in [made.alloc(14 * MIB), made.alloc(12 * MIB)]:
        made.free(block)
    made.record()
    taken = made.alloc(14 * MIB)  # recorded below as a request that the 12 MiB block fits better
    made.events[0]["size"] = taken.requested_bytes = 12 * MIB
    made.alloc(12 * MIB)
    score = scored(tmp_path, made)
    assert (score.blocks, score.blocks_matched) == (2, 1)
    assert not score.agrees
    assert score.first_difference is not None
    assert score.first_difference.startswith(f"event 0, alloc of {12 * MIB} B")
    assert f"recorded {taken.address:#x}" in score.first_difference


def test_a_replay_finds_a_segment_of_the_wrong_size(tmp_path: Path) -> None:
    made = recorder(AllocatorSettings(large_segment_bytes=24 * MIB))  # not among the settings saved
    made.alloc(3 * MIB)
    score = scored(tmp_path, made)
    assert (score.segments, score.segments_matched, score.agrees) == (1, 0, False)


def test_an_expandable_segment_reaches_below_its_lowest_page_when_the_recording_begins(
    tmp_path: Path,
) -> None:
    made = recorder(EXPANDABLE)
    low, _ = made.alloc(20 * MIB), made.alloc(20 * MIB)
    made.free(low)
    made.empty_cache()
    made.record()
    assert made.alloc(10 * MIB).address == low.address
    recording = rewind(loaded(tmp_path, made), 0)
    assert [part.reserved_from for part in recording.start] == [low.address]
    assert scored(tmp_path, made).agrees


def test_an_expandable_segment_still_reaches_down_after_a_difference(tmp_path: Path) -> None:
    made = recorder(EXPANDABLE)
    low, _ = made.alloc(20 * MIB), made.alloc(20 * MIB)
    others = [made.alloc(size * MIB, 7) for size in (14, 2, 12, 2)]
    made.free(others[0])
    made.free(others[2])
    made.record()
    made.free(low)
    made.empty_cache()
    taken = made.alloc(14 * MIB, 7)  # recorded as a request that the 12 MiB block fits better
    made.events[-1]["size"] = taken.requested_bytes = 12 * MIB
    assert made.alloc(10 * MIB).address == low.address
    score = scored(tmp_path, made)
    assert (score.blocks, score.blocks_matched) == (2, 1)
    assert (score.segments, score.segments_matched) == (1, 1)


def test_a_segment_that_is_gone_at_the_end_still_belongs_to_its_private_pool(
    tmp_path: Path,
) -> None:
    made = recorder(AllocatorSettings(max_split_size_bytes=40 * MIB), capacity=70 * MIB)
    private = made.alloc(38 * MIB + 1, 0, PRIVATE)
    public = made.alloc(MIB + 1)  # fits into what is left of the other pool's segment
    made.free(private)
    made.free(public)
    made.alloc(48 * MIB, 0, PRIVATE)  # has the pool give the first segment back
    assert "segment_free" in [event["action"] for event in made.events]
    score = scored(tmp_path, made)
    assert score.first_difference is None
    assert score.agrees


def test_blocks_that_only_a_failed_request_freed_do_not_serve_it(tmp_path: Path) -> None:
    made = recorder(EXPANDABLE, capacity=100 * MIB)
    large, last = made.alloc(60 * MIB, 0, PRIVATE), made.alloc(2 * MIB, 0, PRIVATE)
    other = made.alloc(20 * MIB, 7)
    made.record_stream(large, 99)
    made.free(large)
    made.free(other)
    block = made.alloc(30 * MIB, 0, PRIVATE)  # waits for `large`, and gives the page of `other` up
    assert made.alloc_retries == 1
    assert block.address == last.address + last.size_bytes
    assert scored(tmp_path, made).agrees


@st.composite
def recordings(draw: st.DrawFn) -> Recorder:
    """A random program on several streams, recorded from somewhere in its middle."""
    made = recorder(
        draw(
            st.sampled_from(
                [
                    AllocatorSettings(),
                    EXPANDABLE,
                    AllocatorSettings(max_split_size_bytes=40 * MIB),
                    AllocatorSettings(roundup_power2_divisions=8),
                ]
            )
        ),
        capacity=draw(st.sampled_from([None, 150 * MIB])),
    )
    live: list[Block] = []
    steps = draw(st.integers(0, 40))
    start = draw(st.integers(0, steps))
    for step in range(steps):
        if step == start:
            made.record()
        action = draw(st.integers(0, 9))
        if live and action < 4:
            block = live.pop(draw(st.integers(0, len(live) - 1)))
            if action == 0:
                made.record_stream(block, 99)
            made.free(block)
        elif action == 9 and draw(st.booleans()):
            made.empty_cache()
        else:
            stream, pool_id = draw(st.sampled_from([(0, (0, 0)), (7, (0, 0)), (0, PRIVATE)]))
            size = draw(st.one_of(st.integers(1, 3 * MIB), st.integers(MIB, 50 * MIB)))
            with suppress(OutOfMemory):
                live.append(made.alloc(size, stream, pool_id))
    return made


@given(recordings())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_replay_of_the_simulations_own_recording_matches(tmp_path: Path, made: Recorder) -> None:
    score = scored(tmp_path, made)
    assert score.first_difference is None
    assert score.agrees


def test_the_report_names_every_kind_of_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recorder()
    made.free(made.alloc(5 * MIB))
    good = plain(made.dump())
    write(tmp_path / "good.pickle", good)
    assert main([str(tmp_path)]) == 0
    assert "1 of 1 (100 %)" in capsys.readouterr().out

    write(tmp_path / "two.pickle", {**good, "device_traces": good["device_traces"] * 2})
    stale = {**good, "device_traces": [good["device_traces"][0][:2]]}
    write(tmp_path / "stale.pickle", stale)
    figures = tmp_path / "figures.json"
    assert main([str(tmp_path), "--json", str(figures)]) == 0
    output = capsys.readouterr().out
    assert "stale.pickle: the recording contradicts itself" in output
    assert "two.pickle (device 1): the recording contradicts itself" in output
    assert {row["name"] for row in json.loads(figures.read_text())} == {
        "good.pickle",
        "stale.pickle",
        "two.pickle (device 0)",
        "two.pickle (device 1)",
    }

    (tmp_path / "bad.pickle").write_bytes(b"not a pickle")
    assert main([str(tmp_path)]) == 1
    assert "bad.pickle is not a snapshot" in capsys.readouterr().out


def test_the_report_says_when_there_is_nothing_to_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert main([str(tmp_path / "missing")]) == 2
    assert "holds no file" in capsys.readouterr().err
