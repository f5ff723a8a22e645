"""Loading snapshots, on recordings made by the simulation itself."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autobatch.errors import FileError
from autobatch.memory.allocator import CachingAllocator
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.snapshot import TraceEvent, load_snapshot
from autobatch.support.units import MIB
from tests.support.recordings import loaded, plain, recorder, write


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
