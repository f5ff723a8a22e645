"""How an explained snapshot reads."""

from __future__ import annotations

import dataclasses
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from autobatch.cli import terminal
from autobatch.errors import UsageError
from autobatch.memory.allocator import OutOfMemory
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.records.explanation import Alternative
from autobatch.report import markdown
from autobatch.report.explained_settings import _row
from autobatch.report.explanation import Explanation, explain
from autobatch.report.explanation_summary import explanation_summary
from autobatch.support.units import MIB
from tests.support import browser
from tests.support.recordings import EXPANDABLE, PRIVATE, write
from tests.support.training_recordings import (
    FORWARD,
    TRAIN,
    StackRecorder,
    frame,
    out_of_memory,
    stack_recorder,
    training_steps,
)


def explained(folder: Path, made: StackRecorder, **options: Any) -> Explanation:
    return explain(write(folder / "snapshot.pickle", made.content()), **options)


def trained_content() -> dict[str, Any]:
    made = stack_recorder()
    training_steps(made)
    return made.content()


def trained(folder: Path, **options: Any) -> Explanation:
    return explain(write(folder / "snapshot.pickle", trained_content()), **options)


def section(text: str, title: str) -> str:
    return next(part for part in text.split("\n\n") if part.startswith(title))


def one_space(text: str) -> str:
    return " ".join(text.split())


def test_the_title_and_the_facts_say_what_was_recorded(tmp_path: Path) -> None:
    text = str(trained(tmp_path))
    title, subtitle = text.splitlines()[:2]
    assert title == "102 MiB allocated at the peak, 122 MiB reserved"
    assert subtitle == "device 0, measured by PyTorch's allocator"
    facts = one_space(text.split("\n\n")[1])
    assert facts.startswith(f"snapshot {tmp_path}")
    assert "after 41 of 54 recorded events, for MmBackward0: mm" in facts
    assert "makes all 19 allocations as recorded and reserves the same 127,926,272 bytes" in facts


def test_the_account_ends_in_its_sum(tmp_path: Path) -> None:
    rows = section(str(trained(tmp_path)), "What held the peak (measured)").splitlines()[2:]
    names = [row.split("  ")[1].strip() for row in rows]
    assert names[0] == "optimizer state"
    assert names[-2:] == ["rounding by the allocator", "= peak allocated"]
    numbers = [int(row.split()[-4].replace(",", "")) for row in rows]
    assert sum(numbers[:-1]) == numbers[-1] == 106_955_264


def test_what_is_known_by_which_evidence_is_said(tmp_path: Path) -> None:
    held = section(str(trained(tmp_path)), "What held")
    assert "stack and lifetime" in held
    lines = section(str(trained(tmp_path)), "By line of code")
    assert "no line of Python" in lines
    assert "run/model.py:12 forward" in lines


def test_what_operators_held_sums_to_what_was_allocated(tmp_path: Path) -> None:
    found = trained(tmp_path)
    rows = section(str(found), "By operator").splitlines()[2:]
    assert rows[-1].split()[:3] == ["=", "peak", "allocated"]
    document = explanation_summary(found)
    (table,) = next(part.blocks for part in document.sections if part.title == "By operator")
    numbers = {row[0]: int(row[1]) for row in table.rows if row[1]}
    device = found.devices[0]
    assert sum(numbers.values()) == sum(place.blocks for place in device.places)
    wanted = [place for place in device.places if place.operator == "mse_loss"]
    assert numbers["mse_loss"] == sum(place.blocks for place in wanted) > 0
    assert len({place.operator for place in device.places}) == len(numbers)


def test_small_operators_are_summed(tmp_path: Path) -> None:
    made = stack_recorder()
    for number in range(14):
        native = frame(f"at::_ops::op{number}::call(at::Tensor)", "??", 0)
        made.at([native, frame("build", "/home/me/run/data.py", 3)], (20 - number) * MIB)
    rows = section(str(explained(tmp_path, made)), "By operator").splitlines()[2:]
    assert [row.split()[0] for row in rows[:10]] == [f"op{number}" for number in range(10)]
    assert one_space(rows[10]).startswith("4 more operators 4 34.0 MiB")


def test_a_snapshot_without_operators_has_no_table_of_them(tmp_path: Path) -> None:
    made = stack_recorder()
    made.at([], 3 * MIB)
    assert "By operator" not in str(explained(tmp_path, made))


def test_the_report_says_all_that_the_terminal_does(tmp_path: Path) -> None:
    found = trained(tmp_path)
    page = found.report(tmp_path / "report")
    assert page == tmp_path / "report" / "report.html"
    written, told = page.read_text(), markdown.render(explanation_summary(found))
    assert (page.parent / "report.md").read_text() == told
    assert json.loads((page.parent / "explanation.json").read_text()) == json.loads(found.to_json())
    for part in explanation_summary(found).sections:
        assert f"<h2>{part.title}</h2>" in written or not part.title
    whole = written.replace("<wbr>", "")
    assert "no line of Python" in whole and "run/model.py:12 forward" in whole


def test_the_history_has_the_peak_and_is_drawn(tmp_path: Path) -> None:
    found = trained(tmp_path)
    (device,) = found.devices
    history = device.history
    assert history is not None and device.moment_event is not None
    held = dict(history.held_bytes)
    sums = [sum(each) for each in zip(*held.values(), strict=True)]
    peak = history.events.index(device.moment_event)
    assert max(sums) == sums[peak] == device.reserve.allocated_bytes - device.reserve.rounding_bytes
    assert max(history.reserved_bytes) == device.peak_reserved_bytes
    assert {name: each[peak] for name, each in held.items() if each[peak]} == {
        part.category: part.size_bytes for part in device.held
    }
    page = found.report(tmp_path / "report")
    drawing = (page.parent / "charts" / "history-0.svg").read_text()
    marked = '<g id="history-0-figure_1">'
    assert marked in drawing
    assert marked in page.read_text()
    assert "(charts/history-0.svg)" in (page.parent / "report.md").read_text()


def test_a_long_recording_keeps_its_peak(tmp_path: Path) -> None:
    made = stack_recorder()
    for number in range(700):
        made.free(made.at([], (40 if number == 433 else 1 + number % 3) * MIB))
    history = explained(tmp_path, made).devices[0].history
    assert history is not None
    assert len(history.events) <= 500
    sums = [sum(each) for each in zip(*dict(history.held_bytes).values(), strict=True)]
    assert max(sums) == 40 * MIB
    assert set(sums) < {0, MIB, 2 * MIB, 3 * MIB, 40 * MIB}


def test_names_in_a_recording_are_text_on_the_page(tmp_path: Path) -> None:
    made = stack_recorder()
    made.at([frame("<script>alert(1)</script>", "/home/me/run/data.py", 3)], 3 * MIB)
    written = explained(tmp_path, made).report(tmp_path / "report").read_text()
    assert "<script" not in written
    assert "&lt;script&gt;alert(1)" in written


@pytest.mark.slow
def test_the_page_opens_without_an_error_or_a_request(tmp_path: Path) -> None:
    page = trained(tmp_path).report(tmp_path / "report")
    with browser.chromium() as started:
        for width in (1400, 390):
            with browser.opened(started, page, width=width) as seen:
                assert seen.errors == []
                assert seen.requests == [page.as_uri()]
                assert "102 MiB allocated at the peak" in seen.text("h1")
                body = seen("document.documentElement.scrollWidth")
                assert body <= width


def test_equal_blocks_share_a_row(tmp_path: Path) -> None:
    made = stack_recorder()
    for _ in range(5):
        made.at(FORWARD, 3 * MIB)
    _, _, row = section(str(explained(tmp_path, made)), "Largest blocks").splitlines()
    assert row.split()[:5] == ["3.00", "MiB", "5", "4", "events"]


def test_blocks_alike_are_all_counted_however_few_rows_are_shown(tmp_path: Path) -> None:
    made = stack_recorder()
    for _ in range(50):
        made.at(FORWARD, 3 * MIB)
    for _ in range(2):
        made.at(FORWARD, 2 * MIB)
    _, _, *rows = section(str(explained(tmp_path, made, top=2)), "Largest blocks").splitlines()
    assert [row.split()[:3] for row in rows] == [["3.00", "MiB", "50"], ["2.00", "MiB", "2"]]


def test_free_memory_of_cuda_graphs_is_not_said_to_be_given_back(tmp_path: Path) -> None:
    made = stack_recorder()
    made.free_at(FORWARD, made.alloc(30 * MIB, pool_id=PRIVATE), made.at(FORWARD, 6 * MIB))
    made.at(FORWARD, 60 * MIB)
    told = one_space(section(str(explained(tmp_path, made)), "Reserved, but not allocated"))
    assert "free, held for CUDA graphs or a torch.cuda.MemPool 31,457,280 30.0 MiB" in told
    assert "free segments, which can be given back 20,971,520 20.0 MiB" in told
    assert "The only free block that any request may use has 20.0 MiB" in told


def test_small_places_are_summed(tmp_path: Path) -> None:
    made = stack_recorder()
    for line in range(14):
        made.at([frame("build", "/home/me/run/data.py", line)], (20 - line) * MIB)
    rows = section(str(explained(tmp_path, made)), "By line of code").splitlines()[2:]
    assert len(rows) == 11
    assert "4 more places" in rows[-1]
    assert rows[-1].split()[0] == "34.0"


def test_a_failed_request_comes_first_with_what_would_have_met_it(tmp_path: Path) -> None:
    text = str(explained(tmp_path, out_of_memory()))
    told = one_space(section(text, "Out of memory"))
    assert "asked for 17.0 MiB (17,825,792 bytes), for MmBackward0: mm" in told
    assert "26.0 MiB free in 5 blocks of 80.0 MiB reserved, the largest of 11.0 MiB" in told
    assert "2.00 MiB free, by CUDA" in told
    assert "Within the 82.0 MiB that could be reserved then" in told
    assert "met with `expandable_segments:True`" in told
    rows = section(text, "Other allocator settings").splitlines()
    assert rows[2].endswith("fails")
    assert rows[3].endswith("is met")
    assert text.index("Out of memory") < text.index("What held the peak")


def test_a_request_larger_than_all_memory_has_no_setting(tmp_path: Path) -> None:
    made = out_of_memory()
    made.events[-1]["size"] = 90 * MIB
    told = one_space(section(str(explained(tmp_path, made)), "Out of memory"))
    assert "no setting tried here meets it (simulated): less has to be alive at once" in told


def failed_at_once() -> dict[str, Any]:
    """Return a recording of a process whose first request found no memory."""
    made = stack_recorder(capacity=10 * MIB)
    made.device_free = 50 * MIB
    with pytest.raises(OutOfMemory):
        made.at([frame("build", "/home/me/run/train.py", 3)], 100 * MIB)
    return made.content()


def test_a_first_request_that_fails_is_explained(tmp_path: Path) -> None:
    explanation = explain(write(tmp_path / "snapshot.pickle", failed_at_once()))
    told = one_space(section(str(explanation), "Out of memory"))
    assert "asked for 100 MiB (104,857,600 bytes), for run/train.py:3 build" in told
    assert "nothing was allocated then, so the request itself is too large" in told
    row = section(str(explanation), "Other allocator settings").splitlines()[3]
    assert row.split() == "expandable_segments:True 0 B 0.0% 0 B 1 fails".split()
    assert json.loads(explanation.to_json())["devices"][0]["shortage"]["event"] == 0
    page = explanation.report(tmp_path / "report")
    assert "Out of memory" in page.read_text()
    assert not (page.parent / "charts").exists()


def test_settings_that_reserve_where_the_recorded_ones_do_not_have_no_share() -> None:
    none = alternative(0)
    assert _row(alternative(2 * MIB), none, False)[2] == "-"


def test_a_cache_of_nothing_but_free_blocks_is_drawn(tmp_path: Path) -> None:
    made = stack_recorder()
    made.free_at(FORWARD, made.at(FORWARD, 3 * MIB))
    made.record()
    made.note("oom", 0, 90 * MIB, 0, (0, 0))
    page = explained(tmp_path, made).report(tmp_path / "report")
    assert (page.parent / "charts" / "history-0.png").exists()


def test_a_shortage_from_before_the_recording_is_told(tmp_path: Path) -> None:
    made = stack_recorder(capacity=80 * MIB)
    blocks = [made.at(FORWARD, 9 * MIB) for _ in range(8)]
    made.free_at(FORWARD, *blocks[1::2])
    made.record()
    made.device_free = 0
    with pytest.raises(Exception, match="out of memory"):
        made.at(FORWARD, 17 * MIB)
    told = one_space(section(str(explained(tmp_path, made)), "Out of memory"))
    assert "the recorded settings would have met it, too, from an empty cache" in told


def test_the_other_settings_are_simulated_and_compared(tmp_path: Path) -> None:
    made = stack_recorder()
    blocks = [made.at(FORWARD, 15 * MIB) for _ in range(4)]
    made.free_at(FORWARD, *blocks[:3])
    made.at(FORWARD, 43 * MIB)
    text = section(str(explained(tmp_path, made)), "Other allocator settings (simulated)")
    rows = text.splitlines()
    assert rows[2].split() == "PyTorch's defaults (recorded) 108 MiB - 64.0 MiB 0".split()
    assert rows[3].split() == "expandable_segments:True 60.0 MiB -44.4% 60.0 MiB 0".split()
    assert "the first row is what was recorded" in one_space(text)
    assert "`PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` would reserve 48.0 MiB less" in text


def alternative(peak_reserved_bytes: int) -> Alternative:
    return Alternative(
        settings="",
        recorded=True,
        peak_reserved_bytes=peak_reserved_bytes,
        peak_allocated_bytes=1,
        alloc_retries=0,
        failed=False,
        meets_failed_request=None,
        note="",
    )


def test_a_difference_of_less_than_is_shown_has_no_sign() -> None:
    base = alternative(10_000_000)
    for more, shown in ((0, "0.0%"), (100, "0.0%"), (-100, "0.0%"), (10**6, "+10.0%")):
        other = dataclasses.replace(base, peak_reserved_bytes=10_000_000 + more)
        assert _row(other, base, False)[2] == shown


def test_defaults_that_reserve_less_are_had_by_unsetting_the_variable(tmp_path: Path) -> None:
    made = stack_recorder(EXPANDABLE)
    for size in (15, 20):
        made.at(FORWARD, size * MIB)
    content = made.content()
    content["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    text = one_space(str(explain(write(tmp_path / "snapshot.pickle", content))))
    assert (
        "PyTorch's defaults, with PYTORCH_CUDA_ALLOC_CONF unset, would reserve 4.00 MiB less"
        in text
    )


def test_settings_that_have_no_text_have_a_name(tmp_path: Path) -> None:
    content = trained_content()
    content["allocator_settings"]["garbage_collection_threshold"] = float("nan")
    text = str(explain(write(tmp_path / "snapshot.pickle", content)))
    assert "  PyTorch's defaults: garbage_collection_threshold acts only" in text
    assert "``" not in text


def test_long_settings_leave_the_table_as_narrow_as_a_terminal(tmp_path: Path) -> None:
    classes = ",".join(f"{1 << power}:{1 << power % 4}" for power in range(16))
    long = f"roundup_power2_divisions:[{classes}],max_split_size_mb:256"
    text = section(str(trained(tmp_path, settings=[long])), "Other allocator settings")
    rows = text.splitlines()
    assert max(map(len, rows[:9])) <= 100
    assert rows[8].startswith("  roundup_power2_d…")
    assert f"stands for `{long}`" in one_space(text)


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        (0, "the simulated allocator has no allocation to make"),
        (1, "the simulated allocator makes the one allocation as recorded"),
        (2, "the simulated allocator makes all 2 allocations as recorded"),
    ],
)
def test_any_number_of_requests_reads_well(tmp_path: Path, requests: int, said: str) -> None:
    made = stack_recorder()
    block = made.at(FORWARD, 3 * MIB)
    made.record()
    made.free_at(FORWARD, block)
    for _ in range(requests):
        made.at(FORWARD, 3 * MIB)
    text = one_space(str(explained(tmp_path, made)))
    assert said in text
    assert "3.00 MiB in 1 block was there before the recording" in text


def test_a_recording_that_begins_later_says_how_it_was_begun(tmp_path: Path) -> None:
    made = stack_recorder()
    made.free_at(FORWARD, made.at(FORWARD, 50 * MIB))
    made.at(FORWARD, 2 * MIB)
    made.record()
    made.at(FORWARD, 20 * MIB)
    text = one_space(section(str(explained(tmp_path, made)), "Other allocator settings"))
    assert "placed anew, in the order of their addresses, in an empty cache" in text
    assert "10.0 MiB more than the first row" in text
    assert "No setting tried here saves more than 1%" in text


def test_a_snapshot_without_events_explains_its_last_state(tmp_path: Path) -> None:
    made = stack_recorder(AllocatorSettings(max_split_size_bytes=64 * MIB))
    training_steps(made)
    content = made.content()
    content["device_traces"] = [[]]
    found = explain(write(tmp_path / "state.pickle", content))
    text = str(found)
    assert text.startswith("56.0 MiB allocated in the final state")
    assert "there are no events to replay" in text
    assert "What held the final state (measured)" in text
    assert found.devices[0].history is None
    assert not (found.report(tmp_path / "report").parent / "charts").exists()
    assert "simulated" not in text


def test_several_devices_have_their_sections(tmp_path: Path) -> None:
    made = stack_recorder()
    made.at(FORWARD, 3 * MIB)
    content = made.content()
    content["device_traces"] *= 2
    content["segments"] += [{**part, "device": 1} for part in content["segments"]]
    text = str(explain(write(tmp_path / "two.pickle", content)))
    assert "Device 0: What held the peak (measured)" in text
    assert "Device 1: What held the peak (measured)" in text
    assert text.splitlines()[1].endswith("2 devices, measured by PyTorch's allocator")


def test_text_in_a_snapshot_cannot_steer_the_terminal(tmp_path: Path) -> None:
    made = stack_recorder()
    made.label = "\x1b]0;owned\x07"
    made.at([frame("evil\x1b[2J", "/home/me/\x1b[31m.py", 1), TRAIN], MIB)
    content = made.content()
    content["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"] = "x:\x1b[1m"
    explanation = explain(write(tmp_path / "evil.pickle", content))
    assert "\x1b" not in str(explanation)
    assert "\x1b" not in markdown.render(explanation_summary(explanation))


def test_every_renderer_shows_the_document(tmp_path: Path) -> None:
    document = explanation_summary(explained(tmp_path, out_of_memory()))
    assert "| = peak allocated" in markdown.render(document).replace("**", "")
    console = Console(record=True, width=200, file=StringIO())
    terminal.draw(document, console)
    assert "Out of memory" in console.export_text()


def test_json_has_every_figure(tmp_path: Path) -> None:
    explanation = trained(tmp_path)
    content = json.loads(explanation.to_json())
    assert content["schema_version"] == 1
    (device,) = content["devices"]
    assert device["reserve"]["allocated_bytes"] == 106_955_264
    assert device["held"][0]["category"] == "optimizer state"
    assert device["replay"]["requests"] == 19
    assert len(device["alternatives"]) == 6


def test_one_setting_may_be_given_as_text(tmp_path: Path) -> None:
    explanation = trained(tmp_path, settings="max_split_size_mb:30")
    assert explanation.devices[0].alternatives[-1].settings == "max_split_size_mb:30"
    with pytest.raises(UsageError, match="device=5"):
        trained(tmp_path, device=5)


def test_the_repr_is_one_line(tmp_path: Path) -> None:
    shown = repr(trained(tmp_path))
    assert "\n" not in shown and len(shown) < 300 + len(str(tmp_path))
    assert "device 0 reserved" in shown
