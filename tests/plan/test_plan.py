from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.errors import FileError, UsageError
from autobatch.gpus.catalogue import CATALOGUE
from autobatch.plan.plan import Plan
from autobatch.records.applied import AppliedLever
from autobatch.records.codec import RecordError, decode, encode, parse_json
from autobatch.records.evidence import Timeline
from autobatch.records.holders import Holder, PeakBlocks
from autobatch.support.files import check_writable, prepare_folder, write_text
from tests.support import ROOT
from tests.support.plans import example_plan, ragged_plan

DOCUMENT = encode(
    dataclasses.replace(example_plan(), timeline=Timeline(samples=(), marks=(), peak_event=0))
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return example_plan().save(tmp_path / "plan.json")


def changed(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_plan_answers_with_the_numbers_of_its_split() -> None:
    plan = ragged_plan(131, ((33, 33), (33, 32)))
    assert (plan.micro_batch, plan.accumulation_steps, plan.world_size) == (33, 2, 2)
    assert (plan.target, plan.effective_batch) == (131, 131)


def test_a_plan_counts_its_executions_and_ooms() -> None:
    plan = example_plan()
    failed = dataclasses.replace(plan.trials[0], oom=True, fits=False)
    plan = dataclasses.replace(plan, trials=(*plan.trials, failed))
    assert (plan.executions, plan.ooms) == (4, 1)


def test_a_saved_plan_loads_back_equal(tmp_path: Path) -> None:
    for plan in (
        example_plan(),
        example_plan(ceiling=None, others_bytes=123, gpu=CATALOGUE["h100-80gb"]),
        ragged_plan(257, ((86, 86, 85),), clip_norm=None, autocast=None),
    ):
        assert Plan.load(plan.save(tmp_path / "plan.json")) == plan


@settings(deadline=None)  # no test is timed
@given(
    headroom=st.floats(0, 0.99),
    seconds=st.floats(0, 1e9),
    budget=st.integers(1, 2**62),
    warnings=st.lists(st.text(), max_size=3),
    versions=st.dictionaries(st.text(), st.text(), max_size=3),
)
def test_any_values_survive_the_round_trip(
    headroom: float, seconds: float, budget: int, warnings: list[str], versions: dict[str, str]
) -> None:
    plan = example_plan(
        timeline=Timeline(samples=(), marks=(), peak_event=0),
        headroom=headroom,
        seconds=seconds,
        budget_bytes=budget,
        warnings=tuple(warnings),
        versions=versions,
    )
    document = parse_json(plan.to_json())
    assert isinstance(document, dict)
    for key in ("schema_version", "answer"):
        del document[key]
    assert decode(Plan, document) == plan


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    example_plan().save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_failed_write_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("autobatch.support.files.os.replace", full)
    with pytest.raises(FileError, match="No space left"):
        example_plan().save(path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not JSON"),
        (b"no plan", "not JSON"),
        (b"\x80\x04\x95\xff", "not UTF-8"),
        (b"[" * 200_000, "too deeply"),
        (b'{"a":' * 200_000, "too deeply"),
        (b"[1]", "JSON object"),
        (b"null", "JSON object"),
        (b"{}", "schema_version"),
        (b'{"schema_version": 2}', "schema_version"),
        (b'{"schema_version": 1}', "is missing"),
        (b'{"schema_version": NaN}', "NaN"),
        (b'{"schema_version": 1e999}', "1e999"),
        (b'{"schema_version": ' + b"9" * 100_000 + b"}", "out of range"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_in_one_line(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=complaint) as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"surprise": 1}, "surprise.*unknown"),
        ({"headroom": "0.05"}, "headroom must be a number"),
        ({"headroom": 1.5}, "headroom must be at least 0"),
        ({"headroom": True}, "headroom must be a number"),
        ({"budget_bytes": 1.5}, "budget_bytes must be a whole number"),
        ({"budget_bytes": 0}, "must be positive"),
        ({"budget_bytes": None}, "budget_bytes must be a whole number, not null"),
        ({"warnings": "one"}, "warnings must be a list"),
        ({"trials": [{}]}, r"trials\[0\].micro_batch.*missing"),
        ({"versions": {"torch": 2}}, "versions.torch must be text"),
        ({"split": {"target": 0, "windows": []}}, "split.windows"),
        ({"split": {"target": 5, "windows": [[2, 2], [1]]}}, "as many for each rank"),
        ({"split": {"target": 5, "windows": [[2, 2]]}}, "sum to split.target"),
        ({"split": {"target": 5, "windows": [[2, 3]]}}, "answer does not agree"),
        ({"ceiling": 0}, "ceiling must be at least 1"),
    ],
)
def test_a_tampered_plan_is_refused_with_the_place(
    saved: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(FileError, match=complaint):
        Plan.load(changed(saved, **changes))


def test_a_plan_with_code_in_place_of_autocast_is_refused(saved: Path) -> None:
    model = json.loads(saved.read_text())["model"] | {"autocast": '"); import os  #'}
    with pytest.raises(FileError, match=r"model\.autocast"):
        Plan.load(changed(saved, model=model))


def test_missing_file_and_folder_are_file_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileError, match="cannot read"):
            Plan.load(path)


@pytest.mark.parametrize("name", ["split", "gpu", "trials", "timeline", "ceiling"])
@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_decoding_anything_gives_a_plan_or_a_record_error(name: str, value: object) -> None:
    try:
        plan = decode(Plan, DOCUMENT | {name: value})
    except RecordError as error:
        assert str(error)
    else:
        assert encode(plan)[name] == value


def test_a_printed_plan_begins_with_the_answer_and_accounts_for_every_byte() -> None:
    plan = example_plan()
    text = str(plan)
    assert text.splitlines()[0] == (
        "micro-batch 64 × 4 accumulation steps × 1 GPU = effective batch 256"
    )
    assert f"{plan.footprint.activations_bytes:,}" in text
    assert f"{plan.footprint.peak_device_bytes:,}" in text
    assert "3 executions, 0 OOMs" in text
    assert "(39.4 GiB capacity - 430 MiB context) × (1 - 0.05 headroom) = 37.0 GiB" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_printed_plan_cannot_steer_the_terminal() -> None:
    text = str(example_plan(warnings=("\x1b[2Jgone\r\nnext\ud800",)))
    assert "\x1b" not in text
    assert "\r" not in text
    text.encode()


def test_an_unknown_ceiling_is_called_so() -> None:
    text = str(example_plan(ceiling=None))
    assert "at least micro-batch 115" in text
    assert "upper limit" in text


def test_the_repr_of_a_plan_is_short() -> None:
    for plan in (example_plan(), ragged_plan(131, ((33, 33), (33, 32)))):
        assert repr(plan).count("\n") < 6 and len(repr(plan)) < 300
        assert plan.model.name in repr(plan) and plan.gpu.name in repr(plan)


def test_frames_hold_the_numbers_of_a_plan_with_units_in_their_names() -> None:
    plan = example_plan(
        peak_blocks=(
            PeakBlocks(
                holder=Holder(
                    module="transformer.h.0",
                    op="mm",
                    category="activations",
                    phase="forward",
                    shape=(8, 4),
                    dtype="float32",
                    where="train.py:12 loss",
                ),
                count=2,
                size_bytes=256,
            ),
        )
    )
    assert len(plan.to_frame()) == len(plan.trials)
    assert len(plan.to_frame("curve")) == len(plan.curve)
    assert len(plan.to_frame("timeline")) == len(plan.timeline.samples)
    at_plan = plan.to_frame("breakdown").query("at == 'plan'")
    assert at_plan["size_bytes"].sum() == plan.footprint.peak_device_bytes
    (row,) = plan.to_frame("blocks").to_dict("records")
    assert (row["module"], row["shape"], row["size_bytes"]) == ("transformer.h.0", "8x4", 256)
    for name in ("trials", "curve", "breakdown", "blocks", "timeline"):
        for column, kind in plan.to_frame(name).dtypes.items():
            if kind.kind == "f":
                assert str(column).endswith("seconds"), (name, column)


def test_the_frame_of_a_plan_that_knows_no_blocks_has_their_columns() -> None:
    frame = example_plan(peak_blocks=()).to_frame("blocks")
    assert len(frame) == 0 and "size_bytes" in frame.columns


def test_a_frame_that_there_is_not_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"of is 'trails' .did you mean trials"):
        example_plan().to_frame("trails")  # type: ignore[arg-type]


def test_the_notebook_form_is_a_small_escaped_fragment() -> None:
    fragment = example_plan(warnings=("<script>alert(1)</script>",))._repr_html_()
    assert "<script>" not in fragment
    assert "effective batch 256" in fragment
    assert len(fragment) < 20_000


def test_the_notebook_form_has_a_chart_below_a_headline_larger_than_its_sections() -> None:
    fragment = example_plan()._repr_html_()
    headings = re.findall(r"<(h\d|svg)", fragment)
    assert headings[:2] == ["h2", "svg"]
    assert set(headings[2:]) == {"h3"}


def test_the_notebook_form_looks_right_where_nothing_styles_it() -> None:
    fragment = example_plan()._repr_html_()
    assert "class=" not in fragment.replace('class="warnings"', "").replace('class="notes"', "")
    assert "<caption" not in fragment
    tables = re.findall(r'<table aria-label="([^"]+)"', fragment)
    assert tables and all(fragment.count(f">{title}<") == 1 for title in tables)
    styled = re.findall(r'<t[hd](?: scope="\w+")? style="text-align:(\w+);[^>]*>([^<]*)', fragment)
    assert len(styled) == len(re.findall(r"<t[hd][ >]", fragment))
    sides = {text: side for side, text in styled}
    assert (sides["category"], sides["parameters"], sides["475 MiB"]) == ("left", "left", "right")


def test_printing_a_plan_imports_no_heavy_package() -> None:
    code = (
        "import sys; from tests.support.plans import example_plan;"
        "p = example_plan(); str(p); p._repr_html_();"
        "heavy = {'torch', 'pandas', 'matplotlib', 'rich', 'optuna'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_that_is_a_file_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FileError, match="cannot write into the folder"):
            prepare_folder(path)
    assert prepare_folder(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "plan.json", tmp_path / "nul\0"):
        with pytest.raises(FileError, match="cannot write"):
            check_writable(path)
    check_writable(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_written_in_place() -> None:
    check_writable("/dev/null")
    write_text("/dev/null", "text")
    assert not Path("/dev/null").is_file()


def test_a_plan_keeps_the_levers_that_it_was_made_with(tmp_path: Path) -> None:
    lever = AppliedLever(
        lever="precision",
        value="tf32",
        code='torch.set_float32_matmul_precision("high")',
        trainer="tf32=True",
    )
    plan = example_plan(levers=(lever,))
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert "precision: tf32" in str(plan)


@pytest.mark.parametrize("arguments", ["__import__('os')", "tf32", "a=b", "a=1)(b=2", "**{}", "1"])
def test_arguments_of_a_lever_are_names_with_plain_values(saved: Path, arguments: str) -> None:
    lever = {"lever": "precision", "value": "tf32", "code": "", "trainer": arguments}
    with pytest.raises(FileError, match="no keyword arguments with plain values"):
        Plan.load(changed(saved, levers=[lever]))
