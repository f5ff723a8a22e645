"""How much a command shows, and where."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Any

import pytest

from autobatch.cli import main, running
from autobatch.cli.parser import parser
from autobatch.errors import AutobatchError
from autobatch.gpus.catalogue import CATALOGUE
from tests.support.plans import example_plan

PROBE = ["probe", "m.py:f", "--target", "256", "--gpu", "a100-40gb", "--no-isolate", "--no-cache"]
VERBS = "probe predict advise compare vary sweep check explain report gpus doctor".split()


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
@pytest.mark.parametrize("before", [True, False])
def test_quiet_is_the_first_line_of_the_answer_alone(
    flag: str, before: bool, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([flag, *PROBE] if before else [*PROBE, flag]) == 0
    assert capsys.readouterr() == (f"{str(example_plan()).splitlines()[0]}\n", "")


def test_quiet_lists_names_of_gpus_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpus", "-q"]) == 0
    assert capsys.readouterr().out.split() == list(CATALOGUE)


def test_verbose_says_more_than_the_summary(
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from torch import nn

    monkeypatch.setattr(running, "subject", lambda spec: nn.Linear(4, 2))
    assert main([*PROBE, "-v"]) == 0
    out, err = capsys.readouterr()
    assert "for window in" in out and "for window in" not in str(example_plan())
    assert "model: Linear, 10 parameters" in err
    assert "float32 [2, 4]" in err


def test_debug_shows_where_an_error_comes_from(
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(spec: str) -> None:
        raise AutobatchError("no")

    monkeypatch.setattr(running, "subject", fail)
    assert main([*PROBE, "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "in fail" in err
    assert err.splitlines()[-1] == "autobatch: error: no"


@pytest.mark.parametrize("folder", [["--report", "out"], []])
def test_open_shows_the_report_in_a_browser(
    folder: list[str],
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(webbrowser, "open", lambda url: not shown.append(url))
    assert main([*PROBE, *folder, "--open"]) == 0
    (page,) = tmp_path.glob("*/report.html")
    assert shown == [page.as_uri()]
    assert capsys.readouterr().out.splitlines()[-1].startswith("report: ")


def test_a_machine_without_a_browser_is_told_the_file(
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    assert main([*PROBE, "--report", str(tmp_path / "r"), "--open"]) == 0
    assert f"open {tmp_path / 'r' / 'report.html'} in one" in capsys.readouterr().err


def test_every_example_of_the_help_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        text = capsys.readouterr().out
        for option in ("--quiet", "--verbose", "--debug", "--config"):
            assert option in text
        examples = text[text.index("examples:\n") :].splitlines()[1:]
        assert examples
        for line in examples:
            words = line.partition("#")[0].split()
            assert words[:2] == ["autobatch", verb]
            if "--config" not in words:
                assert parser().parse_args(words[1:]).verb == verb
    assert main(["--help"]) == 0
    assert all(verb in capsys.readouterr().out for verb in [VERBS[0]])
