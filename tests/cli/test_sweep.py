"""The command `sweep`."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from autobatch.cli import main
from autobatch.cli.terminal import follow_all
from autobatch.errors import UsageError
from autobatch.records.progress import Progress
from tests.support import ROOT
from tests.support.sweeps import FakeBench

NET = """
import torch
from torch import nn
import autobatch

def net():
    blocks = (nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4))
    return autobatch.Workload(model=nn.Sequential(*blocks), batch=lambda n: torch.zeros(n, 16))

def clip(trial):
    norm = trial.suggest_categorical("clip", ["as it is", "1"])
    return lambda setup: setup if norm == "as it is" else setup.having(clip_norm=1.0)
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    file = tmp_path / "net.py"
    file.write_text(NET)
    return f"{file}:net"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> FakeBench:
    from autobatch.choosing import sweep as module

    made = FakeBench()
    monkeypatch.setattr(module, "bench_of", lambda *_: made)
    return made


def arguments(spec: str, *more: str) -> list[str]:
    here = ["--no-isolate", "--target", "64", "--gpu", "t4"]
    levers = [] if "--levers" in more else ["--levers", "checkpointing"]
    return ["sweep", spec, *here, *levers, *more]


def test_the_front_is_on_stdout_and_progress_on_stderr(
    spec: str, bench: FakeBench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(spec)) == 0
    out, err = capsys.readouterr()
    assert out.startswith("fastest: as it is, micro-batch 16\nSequential on t4\n")
    assert "Front of speed (estimate) against memory (simulated)" in out
    assert err.startswith("1 of about 36: as it is, micro-batch 64\n")


def test_json_on_stdout_is_nothing_but_json(
    spec: str, bench: FakeBench, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    assert main(arguments(spec, "--json", "-", "--report", str(folder))) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["best"]["micro_batch"] == 16
    assert err.endswith(f"report: {folder / 'report.html'}\n")
    assert json.loads((folder / "sweep.json").read_text()) == answer
    assert (folder / "charts" / "pareto.png").stat().st_size > 10_000


def test_options_reach_the_sweep(
    spec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from autobatch.choosing import sweep as module

    asked: list[dict[str, Any]] = []

    def sweep(model: Any, **options: Any) -> Any:
        asked.append(options)
        raise UsageError("enough")

    monkeypatch.setattr(module, "sweep", sweep)
    own = f"{tmp_path / 'net.py'}:clip"
    more = "--trials 5 --timeout 9 --study s --sampler nsga2 --allow-numerics --headroom 0.1"
    assert main(arguments(spec, "--levers", f"precision, {own}", *more.split())) == 2
    (options,) = asked
    assert options["gpu"].name == "t4" and options["target"] == 64
    name, lever = options["levers"]
    assert name == "precision" and lever.__name__ == "clip"
    known = ("trials", "timeout", "study", "sampler", "allow_numerics", "headroom", "storage")
    assert [options[each] for each in known] == [5, 9.0, "s", "nsga2", True, 0.1, None]


@pytest.mark.slow
def test_levers_of_ones_own_come_from_files_also_in_the_child(spec: str, tmp_path: Path) -> None:
    own = f"{tmp_path / 'net.py'}:clip"
    given = arguments(spec, "--levers", own, "--trials", "2", "--json", str(tmp_path / "s.json"))
    given.remove("--no-isolate")
    assert main(given) == 0
    answer = json.loads((tmp_path / "s.json").read_text())
    assert {trial["settings"]["clip"] for trial in answer["trials"]} <= {"as it is", "1"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--levers", "nosuch"], "there is no lever 'nosuch'"),
        (["--levers", "net.py:nosuch"], "no such file: net.py"),
        (["--storage", "sqlite:////dev/null/x.db"], "cannot open the storage"),
        (["--sampler", "nosuch"], "there is no sampler 'nosuch'"),
        (["--gpu", "24GiB"], "the speed of 24GiB is not known"),
        (["--trials", "0"], "trials is 0: give a number above 0"),
        (["--target", "0"], "the target effective batch is 0"),
        (["--report", "/proc/x"], "cannot write into the folder '/proc/x'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    spec: str, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(spec, *more)) == 2
    err = capsys.readouterr().err
    assert re.search(rf"^autobatch: error: .*{re.escape(said)}.*\n\Z", err, re.MULTILINE)
    assert "Traceback" not in err


def test_a_study_about_another_target_is_refused_with_how_to_begin_anew(
    spec: str, bench: FakeBench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = ["--storage", str(tmp_path / "sweep.journal")]
    assert main(arguments(spec, *storage)) == 0
    assert main(arguments(spec, *storage, "--target", "32")) == 2
    err = capsys.readouterr().err
    assert "target: 64 there, 32 here" in err
    assert "begin anew with --study NAME or another --storage" in err
    assert main(arguments(spec, *storage, "--target", "32", "--study", "other")) == 0


def test_a_bar_is_drawn_on_a_terminal() -> None:
    """The terminal's end of a pty is read while the bar is drawn on the other."""
    parent, child = pty.openpty()
    code = (
        "import sys, time\n"
        "from autobatch.cli.terminal import follow_all\n"
        "from autobatch.records.progress import Progress\n"
        "with follow_all(sys.stderr) as tell:\n"
        "    tell(Progress(step='[x] as it is', executions=3, expected=9, micro_batch=64))\n"
        "    time.sleep(0.3)\n"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=child, env=environment
    )
    os.close(child)
    shown = b""
    with suppress(OSError):  # the other end is closed
        while chunk := os.read(parent, 65536):
            shown += chunk
    assert process.wait() == 0
    assert b"3/9" in shown
    assert b"[x] as it is, micro-batch 64" in shown


def test_without_a_terminal_each_step_is_a_line() -> None:
    stream = io.StringIO()
    with follow_all(stream) as tell:
        tell(Progress(step="as it is", executions=3, expected=9, micro_batch=64))
    assert stream.getvalue() == "4 of about 9: as it is, micro-batch 64\n"
