"""Which files a report may replace, and that a failure leaves no empty folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from autobatch.cli import main
from autobatch.errors import FileError
from autobatch.report.own_files import Report, report_folder
from tests.support.plans import example_plan

NAMES = ["report.html", "plan.json", "report.md", "trials.csv", "charts/memory.svg"]


def foreign(folder: Path, name: str, text: str = '{"mine": 1}') -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_somebody_else_is_never_replaced(name: str, tmp_path: Path) -> None:
    file = foreign(tmp_path, name)
    with pytest.raises(FileError, match=r"was not written by autobatch.*name another folder") as e:
        example_plan().report(tmp_path)
    assert str(file) in str(e.value) and "\n" not in str(e.value)
    assert file.read_text() == '{"mine": 1}'
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [file]


@pytest.mark.parametrize("name", ["report.html", "plan.json"])
def test_a_page_of_somebody_else_beside_a_report_of_ours_is_kept(name: str, tmp_path: Path) -> None:
    example_plan().report(tmp_path)
    file = foreign(tmp_path, name)
    with pytest.raises(FileError, match="was not written by autobatch"):
        example_plan().report(tmp_path)
    assert file.read_text() == '{"mine": 1}'


def test_reports_of_ours_and_what_stands_beside_them_are_replaced(tmp_path: Path) -> None:
    plan = example_plan()
    plan.report(tmp_path)
    plan.report(tmp_path)
    saved = tmp_path / "saved"
    saved.mkdir()
    plan.save(saved / "plan.json")  # a folder that began with a plan
    foreign(saved, "notes.txt")
    foreign(saved, "report.md", text="")  # an empty file has nothing to lose
    assert plan.report(saved).is_file()


def test_a_command_refuses_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    worked: list[Any] = []
    monkeypatch.setattr("autobatch.cli.probe.run_apart", lambda *_, **__: worked.append(1))
    file = foreign(tmp_path, "plan.json")
    command = ["probe", "m.py:f", "--target", "8", "--gpu", "t4", "--report", str(tmp_path)]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line and "was not written by autobatch" in line and not worked


@pytest.mark.parametrize("report", get_args(Report))
def test_a_disk_that_is_full_leaves_no_empty_folder(report: Report, tmp_path: Path) -> None:
    with pytest.raises(FileError), report_folder(report, tmp_path / "a" / "b"):
        raise FileError("No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_whose_disk_is_full_leaves_no_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(FileError, match="No space left"):
        example_plan().report(tmp_path / "r")
    assert list(tmp_path.iterdir()) == []
