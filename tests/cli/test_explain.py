"""`autobatch explain`, from words to exit codes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from autobatch.cli import main
from autobatch.support.units import MIB
from tests.support.recordings import write
from tests.support.training_recordings import FORWARD, stack_recorder, training_steps


@pytest.fixture
def snapshot(tmp_path: Path) -> str:
    made = stack_recorder()
    training_steps(made)
    return str(write(tmp_path / "snapshot.pickle", made.content()))


def test_explain_answers_on_stdout(snapshot: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", snapshot]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("102 MiB allocated at the peak, 122 MiB reserved\n")
    assert err == ""


def test_options_reach_the_explanation(
    snapshot: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answer.json"
    words = ["--top", "2", "--device", "0", "--settings", "max_split_size_mb:30"]
    words += ["--settings", "roundup_power2_divisions:8", "--json", str(file)]
    assert main(["explain", snapshot, *words]) == 0
    (device,) = json.loads(file.read_text())["devices"]
    assert len(device["largest"]) == 2
    tried = [row["settings"] for row in device["alternatives"]]
    assert tried[-2:] == ["max_split_size_mb:30", "roundup_power2_divisions:8"]
    assert "max_split_size_mb:30" in capsys.readouterr().out


def test_json_on_stdout_is_nothing_but_json(
    snapshot: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", snapshot, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == snapshot


def test_a_report_is_written_and_opened(
    snapshot: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: seen.append(address) or True)
    page = tmp_path / "folder" / "report.html"
    assert main(["explain", snapshot, "--report", str(page.parent), "--open"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {page}"
    assert seen == [page.as_uri()]
    assert "102 MiB allocated at the peak" in page.read_text()


def test_no_empty_folder_is_left_where_nothing_can_be_explained(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert main(["explain", str(_missing(tmp_path)), "--report", str(folder)]) == 2
    assert not folder.exists()


def _missing(folder: Path) -> Path:
    return folder / "nothing.pickle"


def _folder(folder: Path) -> Path:
    return folder


def _text(folder: Path) -> Path:
    path = folder / "notes.txt"
    path.write_text("# notes\n")
    return path


def _empty(folder: Path) -> Path:
    path = folder / "empty.pickle"
    path.touch()
    return path


def _truncated(folder: Path) -> Path:
    made = stack_recorder()
    made.at(FORWARD, MIB)
    path = folder / "cut.pickle"
    path.write_bytes(pickle.dumps(made.content())[:-40])
    return path


def _huge(folder: Path) -> Path:
    path = folder / "huge.pickle"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    return path


def _hostile(folder: Path) -> Path:
    return write(folder / "hostile.pickle", {"segments": [print], "device_traces": []})


def _plan(folder: Path) -> Path:
    return write(folder / "plan.pickle", {"micro_batch": 3})


@pytest.mark.parametrize(
    "make", [_missing, _folder, _text, _empty, _truncated, _huge, _hostile, _plan]
)
def test_a_file_that_cannot_be_explained_is_one_line_and_exit_code_2(
    make: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(make)
    path = make(tmp_path)
    assert main(["explain", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("autobatch: error: ") and err.count("\n") == 1
    assert str(path) in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "3"], "--device 3"),
        (["--top", "0"], "--top 0"),
        (["--settings", "max_split_size_mb:1"], "at least 20"),
        (["--settings", "foo:1"], "no allocator setting 'foo'"),
        (["--json", "/nowhere/answer.json"], "cannot write"),
    ],
)
def test_options_that_cannot_be_used_are_usage_errors(
    words: list[str], message: str, snapshot: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", snapshot, *words]) == 2
    assert message in capsys.readouterr().err
