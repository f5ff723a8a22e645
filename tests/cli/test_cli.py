from __future__ import annotations

import inspect
import json
import os
import pty
import shlex
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autobatch.cli import main, running
from autobatch.errors import AutobatchError, DoesNotFitError, UsageError, WorkloadError
from autobatch.gpus import nvml
from autobatch.plan.plan import Plan
from tests.support import ROOT
from tests.support.plans import example_plan, footprint_at

PROBE = ["probe", "m.py:f", "--target", "256", "--gpu", "a100-40gb", "--no-isolate"]
PREDICT = ["predict", "m.py:f", "--micro-batch", "32", "--gpu", "a100-40gb", "--no-isolate"]


def failing_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(spec: str) -> None:
        raise error

    monkeypatch.setattr(running, "subject", fail)


def test_probe_answers_on_stdout_and_reports_progress_on_stderr(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(PROBE) == 0
    out, err = capsys.readouterr()
    assert out == f"{example_plan()}\n"
    assert err == "1 of about 3: running, micro-batch 2\n"


def test_options_reach_the_tuner(calls: list[dict[str, Any]]) -> None:
    options = ["--world-size", "2", "--headroom", "0.1", "--autocast", "bf16", "--clip-norm", "1"]
    assert main([*PROBE, *options, "--optimizer", "sgd"]) == 0
    (asked,) = calls
    assert asked["gpu"].name == "a100-40gb"
    assert (asked["target"], asked["world_size"], asked["headroom"]) == (256, 2, 0.1)
    assert (asked["autocast"], asked["clip_norm"]) == ("bf16", 1.0)
    assert asked["optimizer"] == "sgd"


def test_json_on_stdout_is_nothing_but_json(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*PROBE, "--json", "-", "--report", str(tmp_path / "r")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["answer"]["micro_batch"] == 64
    assert "report.html" in err


def test_json_into_a_file_loads_as_the_plan(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    assert main([*PROBE, "--json", str(tmp_path / "plan.json")]) == 0
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.command == shlex.join(["autobatch", *PROBE, "--json", str(tmp_path / "plan.json")])
    assert replace(plan, command=None) == example_plan()


def test_outputs_are_checked_before_the_work(
    calls: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for options in (["--report", str(tmp_path / "file")], ["--json", str(tmp_path / "no" / "x")]):
        assert main([*PROBE, *options]) == 2
        assert capsys.readouterr().err.startswith("autobatch: error: cannot write")
    assert calls == []


def test_predict_accounts_for_the_micro_batch(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PREDICT, "--accumulation-steps", "4"]) == 0
    assert "on the device at micro-batch 32" in capsys.readouterr().out
    assert (calls[0]["micro_batch"], calls[0]["accumulation_steps"]) == (32, 4)
    assert main([*PREDICT, "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["peak_device_bytes"] == footprint_at(32).peak_device_bytes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("no"), 2),
        (DoesNotFitError("no"), 3),
        (WorkloadError("no"), 1),
        (AutobatchError("no"), 1),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    error: AutobatchError,
    code: int,
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing_with(error, monkeypatch)
    assert main(PROBE) == code
    assert capsys.readouterr() == ("", "autobatch: error: no\n")


def test_the_users_own_lines_are_shown_and_the_last_one_ends_the_message(
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = WorkloadError("the model failed")
    try:
        raise KeyError("their mistake")
    except KeyError as cause:
        error.__cause__ = cause
    failing_with(error, monkeypatch)
    assert main(PROBE) == 1
    err = capsys.readouterr().err
    frame, source, said, last = err.splitlines()
    assert frame.endswith("in test_the_users_own_lines_are_shown_and_the_last_one_ends_the_message")
    assert (source, said) == ('    raise KeyError("their mistake")', "KeyError: 'their mistake'")
    assert last.startswith("autobatch: error: the model failed (tests/cli/test_cli.py:")
    assert main(["-q", *PROBE]) == 1
    assert capsys.readouterr().err == f"{last}\n"
    assert main(["--debug", *PROBE]) == 1
    assert "WorkloadError: the model failed" in capsys.readouterr().err


def test_an_error_without_a_line_of_the_users_names_the_way_to_one(
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = WorkloadError("the model failed: KeyError: 3")
    error.__cause__ = KeyError(3)
    failing_with(error, monkeypatch)
    assert main(PROBE) == 1
    assert capsys.readouterr().err == (
        "autobatch: error: the model failed: KeyError: 3; add --debug for its traceback\n"
    )


def test_ctrl_c_is_told_in_one_line(
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing_with(KeyboardInterrupt(), monkeypatch)
    assert main(PROBE) == 130
    assert capsys.readouterr() == ("", "autobatch: interrupted\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["probe"],
        ["probe", "m.py:f"],
        ["probe", "m.py:f", "--target", "many"],
        [*PROBE, "--optimizer", "no-such"],
        [*PROBE, "--gpu", "no-such-gpu"],
        ["report", "no-such-file.json"],
    ],
)
def test_bad_usage_exits_with_2_and_without_traceback(
    arguments: list[str], calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: " in err and err.count("\n") == 1


def test_a_bare_call_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "Find the micro-batch that fits a GPU" in err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["prob"], "did you mean probe?); see autobatch --help"),
        (["probe", "m.py:f", "--targt", "8"], "no option --targt (did you mean --target"),
        (["probe", "m.py:f", "--target", "8", "--reprot", "x"], "did you mean --report"),
        (["probe", "m.py:f", "x", "--target", "8"], "there is no argument x; see autobatch probe"),
        (["probe", "m.py:f", "--target", "8", "--optimizer", "adamww"], "did you mean adamw"),
        (["probe", "m.py", "--target", "8", "--gpu", "t4"], "did you mean m.py:build or m.py:Odd?"),
        (["probe", "folder.py:f", "--target", "8", "--gpu", "t4"], "folder.py is a folder"),
        (["probe", "m.py:Odd", "--target", "8", "--gpu", "t4"], "return an autobatch.Workload("),
        (["probe", "m.py:build", "--target", "8", "--gpu", "4090ti"], "did you mean rtx-4090"),
        (["probe", "m.py:build", "--target", "8", "--gpu", "24"], "did you mean 24GiB?"),
        (["predict", "m.py:build", "--micro-batch", "8", "--gpu", "p9"], "such as --gpu 24GiB"),
        (
            ["predict", "m.py:build", "--micro-batch", "8", "--gpu", "t4", "--clip-norm", "0"],
            "--clip-norm is 0.0: use a positive norm that is finite, or leave it out",
        ),
        *(
            (
                ["probe", "m.py:build", "--target", "8", "--gpu", "t4", f"{option}={number}"],
                f"argument {option}: '{number}' is no",
            )
            for option in ("--headroom", "--clip-norm", "--time-limit")
            for number in ("nan", "inf", "-inf", "x")
        ),
        (
            ["probe", "m.py:build", "--target", "8", "--gpu", "t4", "--time-limit", "0"],
            "'0' is no time: give seconds",
        ),
        (
            ["sweep", "m.py:build", "--target", "8", "--gpu", "t4", "--timeout", "nan"],
            "argument --timeout: 'nan' is no finite number",
        ),
        (["probe", "m.py:build", "--target", "8"], "such as --gpu a100-40gb or --gpu 24GiB"),
        (["predict", "m.py:build", "--micro-batch", "0", "--gpu", "t4"], "--micro-batch is 0:"),
        (
            ["probe", "m.py:build", "--target", "8", "--gpu", "t4", "--headroom", "2"],
            "--headroom is 2.0: use a share",
        ),
        (
            ["predict", "m.py:build", "--micro-batch", "8", "--gpu", "t4", "--world-size", "0"],
            "--world-size is 0: use a whole number",
        ),
        (
            ["predict", "timm:RESNET50", "--micro-batch", "8", "--gpu", "t4"],
            "did you mean resnet50",
        ),
    ],
)
def test_a_mistake_is_answered_with_what_to_type(
    arguments: list[str],
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if any(argument.startswith("timm:") for argument in arguments):
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "m.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Linear(4, 4)\n"
        "class Odd(nn.Module):\n    def forward(self, a, b, c):\n        return a\n"
    )
    here = [] if arguments[0] == "prob" or "m.py:f" in arguments else ["--no-isolate"]
    assert main([*arguments, *here]) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(("name", "spec"), [("resnet50", "timm:resnet50"), ("GPT2", "hf:GPT2")])
def test_the_name_of_a_model_alone_is_answered_with_its_library(
    name: str, spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    assert main(["probe", name, "--target", "8", "--gpu", "t4", "--no-isolate"]) == 2
    assert f"did you mean {spec}" in capsys.readouterr().err


def test_help_and_version_exit_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["probe", "--help"], ["--version"]):
        assert main(arguments) == 0
    assert "autobatch 0" in capsys.readouterr().out


def test_a_saved_plan_is_rendered_again_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = example_plan().save(tmp_path / "run.json")
    assert main(["report", str(saved)]) == 0
    assert (tmp_path / "run-report" / "report.html").exists()
    assert main(["report", str(saved), "--out", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().out


def test_the_gpu_list_names_the_catalogue_and_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = nvml.InstalledGpu(index=0, name="NVIDIA Test", total_bytes=2**34, used_bytes=2**30)
    shared = nvml.InstalledGpu(index=1, name="NVIDIA GB10", total_bytes=None, used_bytes=None)
    monkeypatch.setattr(nvml, "installed_gpus", lambda: (card, shared))
    assert main(["gpus"]) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines() if "NVIDIA GB10" in line] == [
        ["1", "NVIDIA", "GB10", "-", "-"]
    ]
    assert "a100-40gb" in out
    assert "NVIDIA Test" in out
    assert "16.0 GiB" in out


def test_no_driver_means_no_installed_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def fail() -> None:
        raise NVMLError

    fake = types.SimpleNamespace(NVMLError=NVMLError, nvmlInit=fail)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert nvml.installed_gpus() == ()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.installed_gpus() == ()


def run_gpus(stdout: int, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "autobatch", "gpus"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


def on_a_terminal(**environment: str) -> bytes:
    leader, follower = pty.openpty()
    process = run_gpus(follower, **environment)
    os.close(follower)
    received = b""
    try:
        while chunk := os.read(leader, 4096):
            received += chunk
    except OSError:  # Linux ends a terminal's last read with EIO
        pass
    os.close(leader)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return received


def test_a_terminal_gets_colours_unless_no_color_is_set() -> None:
    assert b"\x1b[" in on_a_terminal(TERM="xterm-256color", NO_COLOR="")
    plain = on_a_terminal(TERM="xterm-256color", NO_COLOR="1")
    assert b"\x1b[" not in plain
    assert b"a100-40gb" in plain


def test_a_closed_pipe_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    process = run_gpus(write)
    os.close(write)
    _, errors = process.communicate()
    assert errors == b""
    assert process.returncode == 141


def redirected(arguments: str, streams: str) -> tuple[int, str, str]:
    """Run a command in a shell, and return its exit code, its stdout and its stderr."""
    done = subprocess.run(
        ["sh", "-c", f"exec {shlex.quote(sys.executable)} -m autobatch {arguments} {streams}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
@pytest.mark.parametrize(
    ("arguments", "streams", "code", "hint"),
    [
        ("gpus", ">&-", 2, "stdout is closed"),
        ("gpus", ">&- 2>&-", 2, ""),
        ("gpus", ">/dev/full", 2, "cannot be written: No space left on device"),
        ("gpus", ">/dev/full 2>/dev/full", 2, ""),
        ("probe m.py --target 8 --gpu t4", ">&-", 2, "stdout is closed"),
        ("probe m.py --target 8 --gpu t4", "2>&-", 2, ""),
        ("probe m.py --target 8 --gpu t4", "2>/dev/full", 2, ""),
    ],
)
def test_streams_that_take_nothing_end_in_one_line_and_a_code(
    arguments: str, streams: str, code: int, hint: str
) -> None:
    returned, out, errors = redirected(arguments, streams)
    assert (returned, out) == (code, "")
    assert hint in errors
    assert errors.count("\n") == bool(hint)


def test_an_answer_is_printed_without_a_stderr() -> None:
    code, out, errors = redirected("gpus", "2>&-")
    assert (code, errors) == (0, "")
    assert "a100-40gb" in out


def test_an_ascii_terminal_still_gets_an_answer() -> None:
    process = run_gpus(subprocess.PIPE, PYTHONIOENCODING="ascii")
    out, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert b"a100-40gb" in out


class Pressed:
    """Stands for who presses Ctrl-C as a module is looked for."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, *_: object) -> None:
        if name == self.module:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "module",
    [
        "autobatch.cli.completion",
        "autobatch.cli.parser",
        "autobatch.cli.config",
        "autobatch.support.process",
        "autobatch.cli.command",
    ],
)
@pytest.mark.parametrize(
    "start",
    [
        "from autobatch.cli.entry_point import entry; entry()",
        "import runpy; runpy.run_module('autobatch', run_name='__main__')",
    ],
    ids=["the console script", "python -m"],
)
def test_ctrl_c_as_the_command_is_imported_is_told_in_one_line(module: str, start: str) -> None:
    pressed = f"import sys\nsys.meta_path.insert(0, Pressed({module!r}))"
    done = run_python(f"{inspect.getsource(Pressed)}\n{pressed}\n{start}")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "autobatch: interrupted\n")


def test_the_console_script_imports_next_to_nothing_before_it_minds_ctrl_c() -> None:
    code = (
        "import sys; before = set(sys.modules); import autobatch.cli.entry_point;"
        "print(*sorted(name for name in set(sys.modules) - before if 'autobatch' in name))"
    )
    needed = "autobatch autobatch._version autobatch.cli autobatch.cli.entry_point"
    assert run_python(code).stdout.split() == needed.split()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys; from autobatch.cli import main; main(['--help']);"
        "sys.exit(', '.join({'torch', 'pandas', 'matplotlib', 'rich'} & set(sys.modules)) or None)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_files_are_written_also_where_nobody_reads_the_answer(
    calls: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    written, folder = tmp_path / "plan.json", tmp_path / "report"
    with monkeypatch.context() as patched, os.fdopen(writer, "w") as stdout:
        patched.setattr(sys, "stdout", stdout)
        assert main([*PROBE, "--json", str(written), "--report", str(folder)]) == 141
    assert Plan.load(written).micro_batch == 64
    assert (folder / "report.html").exists()
