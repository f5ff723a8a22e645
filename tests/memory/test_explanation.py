"""What a snapshot shows, on recordings made by the simulated allocator."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from autobatch.errors import FileError, UsageError
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.explanation import explain_snapshot, load_for_explanation
from autobatch.memory.recording import rewind
from autobatch.memory.snapshot import read_snapshot
from autobatch.memory.what_if import releases, rerun
from autobatch.records.explanation import DeviceExplanation
from autobatch.support.units import GIB, MIB
from tests.support.random_recordings import recordings
from tests.support.recordings import EXPANDABLE, PRIVATE, Recorder, plain, recorder, write
from tests.support.training_recordings import (
    ACCUMULATE,
    EMPTY_CACHE,
    ENGINE,
    FORWARD,
    INIT_STATE,
    LOSS,
    MODULE_TO,
    RECOMPUTE,
    STEP,
    TRAIN,
    WORKSPACE,
    ZERO_GRAD,
    StackRecorder,
    frame,
    out_of_memory,
    stack_recorder,
    training_steps,
)

OUTSIDE = "outside of modules"


def explained(content: dict[str, Any], **options: Any) -> DeviceExplanation:
    (device,) = explain_snapshot(
        read_snapshot(content, stacks=True), "snapshot.pickle", **options
    ).devices
    return device


def sizes(device: DeviceExplanation) -> dict[str, int]:
    found: Counter[str] = Counter()
    for held in device.held:
        found[held.category] += held.size_bytes
    return dict(found)


def check_sums(device: DeviceExplanation) -> None:
    reserve = device.reserve
    rounding = reserve.rounding_bytes
    assert rounding >= 0
    assert sum(each.size_bytes for each in device.held) + rounding == reserve.allocated_bytes
    assert sum(each.size_bytes for each in device.places) + rounding == reserve.allocated_bytes
    assert sum(each.blocks for each in device.held) == sum(each.blocks for each in device.places)
    free = reserve.split_bytes + reserve.whole_bytes + reserve.private_bytes
    assert reserve.reserved_bytes == reserve.allocated_bytes + reserve.awaiting_bytes + free
    assert reserve.largest_free_bytes <= reserve.split_bytes + reserve.whole_bytes


def test_the_parts_of_a_training_step_are_told_by_stack_and_lifetime() -> None:
    made = stack_recorder()
    training_steps(made)
    device = explained(made.content())
    assert sizes(device) == {
        "parameters and buffers": 16 * MIB,
        "optimizer state": 32 * MIB,
        "activations": 24 * MIB,
        "gradients": 16 * MIB,
        "workspace": 8 * MIB,
        "backward temporaries": 5 * MIB,
        OUTSIDE: 512,
    }
    assert {each.category: each.basis for each in device.held} == {
        "parameters and buffers": "stack",
        "optimizer state": "stack",
        "activations": "stack and lifetime",
        "gradients": "stack and lifetime",
        "workspace": "stack",
        "backward temporaries": "stack and lifetime",
        OUTSIDE: "stack",
    }
    check_sums(device)
    assert device.reserve.allocated_bytes == made.peak_allocated_bytes


def test_the_line_is_the_users_and_the_operator_pytorchs() -> None:
    made = stack_recorder()
    training_steps(made)
    places = {
        (each.where, each.operator): each.category for each in explained(made.content()).places
    }
    assert places["run/model.py:12 forward", "relu"] in ("activations", "workspace")
    assert places["", "MmBackward0: mm"] in ("gradients", "backward temporaries")
    assert places["run/train.py:30 train", "mse_loss"] == OUTSIDE
    assert places["run/train.py:30 train", "torch/optim/adam.py:170 _init_group"] == (
        "optimizer state"
    )


def test_lines_of_windows_and_notebooks_are_the_users() -> None:
    made = stack_recorder()
    library = frame("linear", r"D:\venv\Lib\site-packages\torch\nn\functional.py", 3)
    made.at([library, frame("forward", r"D:\code\model.py", 7)], MIB)
    made.at([library, frame("<cell line: 1>", "/tmp/ipykernel_77/12.py", 2)], MIB)
    made.at([frame("helper", "/usr/lib/python3.12/functools.py", 2)], MIB)
    made.at([frame("call", "/tmp/torchinductor_me/ab/cxy.py", 9), TRAIN], MIB)
    lines = {each.where for each in explained(made.content()).places}
    assert lines == {
        "code/model.py:7 forward",
        "ipykernel_77/12.py:2 <cell line: 1>",
        "",
        "run/train.py:30 train",
    }


def test_activations_that_a_checkpoint_computes_again_are_named() -> None:
    made = stack_recorder()
    made.at(ENGINE, MIB)
    again = made.at([*RECOMPUTE, *ENGINE[2:]], 30 * MIB)
    made.free_at(ENGINE, again)
    assert sizes(explained(made.content()))["activations computed again"] == 30 * MIB


def test_lines_that_a_compiled_backward_pass_names_are_no_second_forward_pass() -> None:
    made = stack_recorder()
    graph = frame("call", "/tmp/torchinductor_me/ab/cxy.py", 9)
    scratch = made.at([graph, frame("forward", "/home/me/run/model.py", 7), *ENGINE[2:]], MIB)
    made.free_at(ENGINE, scratch)
    assert sizes(explained(made.content())) == {"backward temporaries": MIB}


def test_a_block_without_a_stack_is_unknown_and_ends_what_is_known_of_others() -> None:
    made = stack_recorder()
    kept = made.at(FORWARD, 20 * MIB)
    made.free_at([], made.at([], 3 * MIB))
    made.free_at([], kept)
    device = explained(made.content())
    assert sizes(device) == {
        "unknown (no stack)": 3 * MIB,
        "activations or outputs": 20 * MIB,
    }
    assert "1 block of 2 came without a stack" in " ".join(device.notes)


def test_a_recording_without_stacks_tells_nothing_but_age() -> None:
    made = recorder()
    made.alloc(2 * MIB)
    made.record()
    made.alloc(3 * MIB)
    device = explained(plain(made.dump()))
    assert sizes(device) == {
        "from before the recording": 2 * MIB,
        "unknown (no stack)": 3 * MIB,
    }
    assert {each.basis for each in device.held} == {"lifetime", "nothing"}
    assert {each.where for each in device.places} == {""}


def test_what_was_there_before_is_told_by_how_it_ends() -> None:
    made = stack_recorder()
    first, second, third, fourth = (made.alloc(size * MIB) for size in (2, 3, 4, 5))
    made.record()
    made.free_at(ZERO_GRAD, first)
    made.free_at(ENGINE, second)
    made.free_at(STEP, third)
    made.free_at([TRAIN], fourth)
    assert sizes(explained(made.content())) == {
        "gradients": 2 * MIB,
        "from before, freed in the backward pass": 3 * MIB,
        "from before, freed in the optimizer step": 4 * MIB,
        "from before, freed in the recording": 5 * MIB,
    }


def test_what_was_there_before_is_told_by_the_stack_that_the_last_state_keeps() -> None:
    made = stack_recorder()
    made.at(INIT_STATE, 2 * MIB)
    made.at(MODULE_TO, 3 * MIB)
    made.at(STEP, 4 * MIB)
    made.at([], 5 * MIB)
    content = made.content()
    content["device_traces"] = [[]]
    device = explained(content)
    assert (device.moment, device.events, device.replay) == ("end", 0, None)
    assert sizes(device) == {
        "optimizer state": 2 * MIB,
        "parameters and buffers": 3 * MIB,
        "optimizer state or temporaries": 4 * MIB,
        "unknown (no stack)": 5 * MIB,
    }
    assert "final state" in device.notes[0]
    check_sums(device)


def test_the_state_of_an_optimizer_of_ones_own_needs_the_end_of_its_step() -> None:
    made = stack_recorder()
    made.at(STEP, 6 * MIB)
    content = made.content()
    assert sizes(explained(content)) == {"optimizer state or temporaries": 6 * MIB}
    content["external_annotations"] = [
        {"stage": stage, "name": "Optimizer.step#Mine.step", "device": 0, "time_us": time}
        for stage, time in (("START", 1), ("END", 99))
    ]
    assert sizes(explained(content)) == {"optimizer state": 6 * MIB}


def test_an_annotation_tells_of_blocks_without_a_stack() -> None:
    made = stack_recorder()
    made.alloc(6 * MIB)
    content = made.content()
    content["external_annotations"] = [
        {"stage": "START", "name": "Optimizer.step#AdamW.step", "device": 0, "time_us": 1},
        {"stage": "END", "name": "Optimizer.step#AdamW.step", "device": 0, "time_us": 9},
    ]
    (held,) = explained(content).held
    assert (held.category, held.basis) == ("optimizer state", "annotation")


def test_labels_and_the_profilers_categories_are_kept() -> None:
    made = stack_recorder()
    made.label = "encoder"
    made.at(FORWARD, 2 * MIB)
    made.label = ""
    made.at(FORWARD, 3 * MIB)
    block = made.at(LOSS, 4 * MIB)
    made.label = "mask"
    made.note("annotate", block.address, 0, 0, (0, 0))
    content = made.content()
    content["device_traces"][0][3]["category"] = "OPTIMIZER_STATE".lower()
    device = explained(content)
    assert {each.label: each.size_bytes for each in device.places} == {
        "encoder": 2 * MIB,
        "": 3 * MIB,
        "mask": 4 * MIB,
    }
    assert [each.category for each in device.held if each.basis == "profiler"] == [
        "optimizer state"
    ]


def test_free_memory_is_split_into_what_can_be_given_back_and_what_cannot() -> None:
    made = stack_recorder()
    whole = made.at(FORWARD, 30 * MIB)
    part, other = made.at(FORWARD, 6 * MIB), made.at(FORWARD, 6 * MIB)
    made.free_at(FORWARD, whole, part)
    made.at(FORWARD, 60 * MIB)
    reserve = explained(made.content()).reserve
    assert other.size_bytes == 6 * MIB
    assert reserve.whole_bytes == 30 * MIB
    assert reserve.split_bytes == (6 + 8) * MIB
    assert (reserve.free_blocks, reserve.largest_free_bytes) == (3, 30 * MIB)


def test_whole_pages_of_an_expandable_segment_can_be_given_back() -> None:
    made = stack_recorder(EXPANDABLE)
    freed = made.at(FORWARD, 50 * MIB)
    made.at(FORWARD, 5 * MIB)
    made.free_at(FORWARD, freed)
    made.at(FORWARD, 200 * MIB)
    reserve = explained(made.content()).reserve
    assert (reserve.whole_bytes, reserve.split_bytes) == (40 * MIB, 15 * MIB)


def test_free_memory_of_private_pools_cannot_be_given_back() -> None:
    made = stack_recorder()
    whole, part = made.alloc(30 * MIB, pool_id=PRIVATE), made.alloc(6 * MIB, pool_id=PRIVATE)
    made.alloc(6 * MIB, pool_id=PRIVATE)
    made.free_at(FORWARD, whole, part, made.at(FORWARD, 6 * MIB))
    made.at(FORWARD, 60 * MIB)
    device = explained(made.content())
    check_sums(device)
    reserve = device.reserve
    assert (reserve.private_bytes, reserve.whole_bytes) == ((30 + 14) * MIB, 20 * MIB)
    assert reserve.split_bytes == 0
    assert (reserve.free_blocks, reserve.largest_free_bytes) == (1, 20 * MIB)


def test_the_largest_blocks_come_first_with_their_age() -> None:
    made = stack_recorder()
    made.at(FORWARD, 2 * MIB)
    made.record()
    made.at(FORWARD, 9 * MIB)
    made.at(WORKSPACE, 4 * MIB)
    first, second = explained(made.content(), top=2).largest
    assert (first.requested_bytes, second.requested_bytes) == (9 * MIB, 4 * MIB)
    assert (first.size_bytes, second.age_events) == (9 * MIB, 0)
    assert explained(made.content()).largest[2].age_events is None


def test_blocks_alike_are_counted_before_the_largest_are_chosen() -> None:
    made = stack_recorder()
    for _ in range(50):
        made.at(FORWARD, 20 * MIB)
    for size in (9, 8, 7):
        made.at(FORWARD, size * MIB)
    found = explained(made.content(), top=3).largest
    assert [(each.blocks, each.requested_bytes) for each in found] == [
        (50, 20 * MIB),
        (1, 9 * MIB),
        (1, 8 * MIB),
    ]
    assert found[0].age_events > found[1].age_events > 0


def test_a_recording_from_the_beginning_is_simulated_as_it_was() -> None:
    made = stack_recorder(AllocatorSettings(roundup_power2_divisions=4))
    training_steps(made)
    device = explained(made.content())
    assert device.starts_empty
    assert device.replay and device.replay.exact
    recorded = device.alternatives[0]
    assert recorded.recorded
    assert recorded.peak_reserved_bytes == made.peak_reserved_bytes
    assert device.alternatives[1].settings == ""


def test_other_settings_reserve_what_a_run_under_them_does() -> None:
    ordinary = stack_recorder()
    training_steps(ordinary)
    device = explained(ordinary.content(), settings=["max_split_size_mb:30"])
    for row in device.alternatives:
        made = stack_recorder(AllocatorSettings.parse(row.settings))
        training_steps(made)
        assert row.peak_reserved_bytes == made.peak_reserved_bytes, row.settings
        assert row.peak_allocated_bytes == made.peak_allocated_bytes, row.settings
    assert device.alternatives[-1].settings == "max_split_size_mb:30"


def released(made: StackRecorder) -> list[str]:
    return list(releases(rewind(read_snapshot(made.content(), stacks=True), 0)).values())


def test_a_cache_that_the_program_empties_is_emptied_again() -> None:
    made = stack_recorder()
    made.free_at(FORWARD, made.at(FORWARD, 40 * MIB))
    made.stack = EMPTY_CACHE
    made.empty_cache()
    made.free_at([TRAIN], made.at(FORWARD, MIB))
    made.at(FORWARD, 60 * MIB)
    device = explained(made.content())
    assert released(made) == ["program"]
    assert device.replay and device.replay.exact
    assert device.alloc_retries == 0
    assert device.peak_reserved_bytes == 62 * MIB
    assert device.alternatives[0].peak_reserved_bytes == 62 * MIB


def test_releases_of_the_allocator_are_told_from_those_of_the_program_by_the_stack() -> None:
    made = stack_recorder(capacity=60 * MIB)
    made.free_at([TRAIN], made.at(FORWARD, 40 * MIB))
    made.at(FORWARD, 50 * MIB)
    device = explained(made.content())
    assert released(made) == ["allocator"]
    assert device.alloc_retries == 1
    assert device.replay and device.replay.exact
    assert device.alternatives[0].alloc_retries == 1


def test_without_stacks_of_frees_a_release_is_the_programs_where_memory_was_not_short() -> None:
    made = stack_recorder()
    made.at(FORWARD, 90 * MIB)
    made.free_at(FORWARD, made.at(FORWARD, 40 * MIB))  # PyTorch repeats the stack of the request
    made.empty_cache()
    made.at(FORWARD, 30 * MIB)
    assert released(made) == ["either"]
    made.at(FORWARD, 60 * MIB)
    assert released(made) == ["program"]


def test_a_release_by_whom_is_not_known_is_told_and_repeated() -> None:
    made = stack_recorder()
    made.free_at(FORWARD, made.at(FORWARD, 40 * MIB))
    made.empty_cache()
    made.at(FORWARD, 50 * MIB)
    device = explained(made.content())
    assert device.replay and device.replay.exact
    assert "does not tell" in device.notes[0]
    assert device.alternatives[0].peak_reserved_bytes == 50 * MIB


def test_a_request_that_failed_is_told_with_what_would_have_met_it() -> None:
    device = explained(out_of_memory().content())
    shortage = device.shortage
    assert shortage is not None
    assert shortage.requested_bytes == 17 * MIB
    assert shortage.reserve.split_bytes == 26 * MIB
    assert shortage.reserve.largest_free_bytes == 11 * MIB
    assert (shortage.limit_bytes, shortage.limited_by_process) == (82 * MIB, False)
    met = {row.settings: row.meets_failed_request for row in device.alternatives}
    assert met[""] is False
    assert met["expandable_segments:True"] is True


def test_a_failed_request_without_a_word_of_the_driver_gets_no_more_than_there_once_was() -> None:
    device = explained(out_of_memory(device_free=None).content())
    assert device.shortage and device.shortage.limit_bytes == 80 * MIB
    assert device.alternatives[0].meets_failed_request is False


def test_a_request_that_fails_while_cuda_has_enough_met_a_limit_of_the_process() -> None:
    device = explained(out_of_memory(device_free=10 * GIB).content())
    assert device.shortage and device.shortage.limited_by_process
    assert device.shortage.limit_bytes == 80 * MIB + 18 * MIB - 1
    assert device.alternatives[0].meets_failed_request is False


def test_events_that_contradict_the_last_state_are_left_out_and_told() -> None:
    made = stack_recorder()
    training_steps(made)
    content = made.content()
    stray = {"action": "free_completed", "addr": made.events[-1]["addr"], "size": 1, "stream": 0}
    content["device_traces"][0].insert(5, stray)
    device = explained(content)
    assert "could not be placed" in " ".join(device.notes)
    assert device.events < len(content["device_traces"][0])
    check_sums(device)


def test_several_devices_are_explained_each_or_one() -> None:
    content = plain(recorder().dump())
    first, second = stack_recorder(), stack_recorder()
    training_steps(first)
    second.at(FORWARD, 3 * MIB)
    content["device_traces"] = [first.content()["device_traces"][0], [], second.events]
    content["segments"] = first.content()["segments"] + [
        {**part, "device": 2} for part in second.content()["segments"]
    ]
    snapshot = read_snapshot(content, stacks=True)
    devices = explain_snapshot(snapshot, "s").devices
    assert [each.device for each in devices] == [0, 2]
    assert devices[1].reserve.allocated_bytes == 3 * MIB
    (only,) = explain_snapshot(snapshot, "s", device=2).devices
    assert only == devices[1]
    with pytest.raises(UsageError, match="nothing of device=1: it shows 0, 2"):
        explain_snapshot(snapshot, "s", device=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ["max_split_size_mb:1"]}, "at least 20"),
        ({"settings": ["often"]}, "not of the form key:value"),
        ({"settings": ["foo:1"]}, "no allocator setting 'foo'; settings: expandable_segments"),
        ({"settings": ["max_split_size:64"]}, "did you mean max_split_size_mb"),
        ({"top": 0}, "top=0 shows nothing"),
        ({"top": 1.5}, "top=1.5 shows nothing"),
        ({"top": True}, "top=True shows nothing"),
        ({"device": True}, "shows nothing of device=True"),
        ({"device": 0.0}, "shows nothing of device=0.0"),
        ({"settings": [5]}, "settings holds a int"),
        ({"settings": 5}, "settings holds a int"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    made = stack_recorder()
    made.at(FORWARD, MIB)
    with pytest.raises(UsageError, match=message):
        explained(made.content(), **options)


def test_a_snapshot_of_nothing_says_how_to_record() -> None:
    with pytest.raises(UsageError, match="_record_memory_history"):
        explained({"segments": [], "device_traces": [[], []]})


def test_settings_that_do_not_act_here_are_told() -> None:
    made = stack_recorder()
    made.at(FORWARD, MIB)
    texts = ["garbage_collection_threshold:0.8", "backend:native"]
    rows = explained(made.content(), settings=texts).alternatives[-2:]
    assert "left out" in rows[0].note
    assert "backend" in rows[1].note


def _oversized(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(9 * GIB)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "No such file"),
        (lambda path: path.parent, "Is a directory"),
        (lambda path: write(path, [1]), "the file is a list"),
        (_oversized, "at most 8.00 GiB are read"),
    ],
)
def test_a_file_that_is_no_snapshot_gives_one_line(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    path = make(tmp_path / "file.pickle")
    with pytest.raises(FileError, match=message) as caught:
        load_for_explanation(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "frames", [[1], [{"name": 1, "filename": "", "line": 0}], [{"name": ""}], {"a": 1}, "words"]
)
def test_frames_of_another_structure_are_refused(tmp_path: Path, frames: object) -> None:
    made = stack_recorder()
    made.at(FORWARD, MIB)
    content = made.content()
    content["device_traces"][0][1]["frames"] = frames
    with pytest.raises(FileError, match="not a memory snapshot"):
        load_for_explanation(write(tmp_path / "frames.pickle", content))


@pytest.mark.parametrize("number", [-1, 1 << 70, 1 << 20000], ids=["negative", "large", "huge"])
def test_numbers_that_cannot_be_sizes_are_refused(tmp_path: Path, number: int) -> None:
    made = stack_recorder()
    made.at(FORWARD, MIB)
    content = made.content()
    content["device_traces"][0][1]["size"] = number
    with pytest.raises(FileError, match="out of range"):
        load_for_explanation(write(tmp_path / "number.pickle", content))


@given(recordings())
def test_the_account_of_any_recording_adds_up(made: Recorder) -> None:
    content = pickle.loads(pickle.dumps(plain(made.dump())))
    snapshot = read_snapshot(content, stacks=True)
    if not snapshot.segments and not snapshot.traces[0]:
        return
    device = explained(content)
    check_sums(device)
    if device.moment == "end":
        assert device.reserve.allocated_bytes == made.allocated_bytes
        return
    assert device.reserve.allocated_bytes == made.peak_allocated_bytes
    assert device.peak_reserved_bytes == made.peak_reserved_bytes
    assert device.replay is not None
    assert device.replay.requests == device.replay.requests_matched
    by = releases(rewind(snapshot, 0)).values()
    assert device.replay.exact or (by and device.replay.first_difference)
    assert all(row.peak_reserved_bytes >= row.peak_allocated_bytes for row in device.alternatives)


@given(recordings())
def test_under_the_recorded_settings_the_same_is_reserved(made: Recorder) -> None:
    snapshot = read_snapshot(plain(made.dump()))
    recording = rewind(snapshot, 0)
    if {"segment_free", "segment_unmap", "oom"} & {event.action for event in recording.events}:
        return  # the memory ran out, or the program emptied the cache
    found = rerun(recording, snapshot.settings, released={}, start=recording.start)
    assert found.peak_reserved_bytes == made.peak_reserved_bytes
    assert found.peak_allocated_bytes == made.peak_allocated_bytes
    assert found.failed_event is None


def test_what_outlives_the_forward_pass_is_not_called_an_output() -> None:
    made = stack_recorder()
    made.at(FORWARD[1:], 8 * MIB)  # without C++ stacks, a workspace of cuBLAS looks so, too
    made.free_at(ENGINE, made.at(ENGINE, MIB))
    assert sizes(explained(made.content()))["kept after forward"] == 8 * MIB


def test_events_of_which_none_can_be_placed_leave_the_last_state() -> None:
    stray = {"action": "alloc", "addr": 1 << 30, "size": 512, "stream": 0}
    device = explained({"segments": [], "device_traces": [[stray] * 3]})
    assert (device.moment, device.events) == ("end", 0)
    (note,) = device.notes
    assert note.startswith("3 events at the beginning could not be placed")
    assert note.endswith("this is the final state")


def test_the_innermost_purpose_counts() -> None:
    made = stack_recorder()
    made.at([WORKSPACE[0], *ACCUMULATE], 8 * MIB)
    assert sizes(explained(made.content())) == {"workspace": 8 * MIB}


def test_a_free_that_a_shortage_completed_early_is_not_completed_again() -> None:
    made = stack_recorder()
    block = made.at(FORWARD, 30 * MIB)
    made.record_stream(block, 99)
    made.free(block)
    other = made.at(FORWARD, 50 * MIB)
    made.complete_free(block)
    made.free(other)
    recording = rewind(read_snapshot(made.content()), 0)
    outcome = rerun(recording, AllocatorSettings(), released={}, capacity_bytes=60 * MIB)
    assert (outcome.alloc_retries, outcome.failed_event) == (1, None)
    assert outcome.peak_reserved_bytes == 50 * MIB
    assert rerun(recording, AllocatorSettings(), released={}).peak_reserved_bytes == 80 * MIB
