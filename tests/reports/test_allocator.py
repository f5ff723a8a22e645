"""Rewinding and replaying recordings, made by the simulation itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.recording import rewind
from autobatch.memory.snapshot import load_snapshot
from autobatch.support.units import MIB
from reports.allocator.__main__ import main
from reports.allocator.score import Score, replay
from tests.support.random_recordings import recordings
from tests.support.recordings import (
    EXPANDABLE,
    PRIVATE,
    Recorder,
    loaded,
    plain,
    recorder,
    segment_record,
    write,
)


def scored(folder: Path, made: Recorder) -> Score:
    snapshot = loaded(folder, made)
    recording = rewind(snapshot, 0)
    assert recording.contradiction is None
    return replay(recording, snapshot.segments.get(0, ()), snapshot.settings)


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


def test_the_recording_decides_between_free_blocks_of_one_size(tmp_path: Path) -> None:
    made = recorder()
    pair = [made.alloc(30 * MIB), made.alloc(30 * MIB)]
    for block in pair:
        made.free(block)
    before = len(made.events)
    low, high = made.alloc(30 * MIB), made.alloc(30 * MIB)
    made.free(low)
    made.events[before:] = [made.events[before + 1]]  # as if only the higher one had been taken
    assert made.events[-1]["addr"] == high.address
    score = scored(tmp_path, made)
    assert score.agrees
    assert score.ties == 1


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
