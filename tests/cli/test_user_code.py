"""The command line and code that prints, exits, crashes or is interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autobatch.cli import main
from tests.support import ROOT

SPEC = """
import ctypes, os, sys, time
import torch
from torch import nn
import autobatch

def make(act, where):
    class Net(nn.Linear):
        def __init__(self):
            super().__init__(4, 1)
            if where == "build":
                act()
        def forward(self, x):
            if where == "forward":
                act()
            return super().forward(x)
    def build():
        batch = lambda n: torch.randn(n, 4)
        return autobatch.Workload(model=Net(), batch=batch, loss=lambda m, b: m(b).mean())
    return build

def shout():
    print("loud")
    os.write(1, b"loud")
    os.system("echo loud")

prints_in_build, prints_in_forward = make(shout, "build"), make(shout, "forward")
exits = make(lambda: sys.exit(0), "forward")
leaves = make(lambda: os._exit(0), "build")
fails = make(lambda: torch.ones(2).view(7), "forward")
cannot_be_built = make(lambda: 1 / 0, "build")
crashes = make(lambda: ctypes.string_at(0), "forward")
waits = make(lambda: time.sleep(60), "forward")
"""
LOUD = "print('loud')\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "s.py").write_text(SPEC)
    (tmp_path / "loud.py").write_text(LOUD + SPEC)
    monkeypatch.setenv("AUTOBATCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "autobatch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running_in(group: int) -> list[str]:
    """Return the processes of a group that have not ended, where Linux lists them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            state, _, of_group, *_ = file.read_text().rpartition(")")[2].split()
            found += [file.parent.name] * (int(of_group) == group and state != "Z")
    return found


@pytest.mark.slow
def test_stdout_is_the_answer_alone_whatever_the_code_prints(folder: Path) -> None:
    done = run(
        "predict", "loud.py:prints_in_forward", "--micro-batch", "2", "--gpu", "t4", "--json", "-"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["micro_batch"] == 2
    assert done.stderr.count("loud") > 3


@pytest.mark.parametrize("verb", ["predict", "check"])
def test_stdout_is_the_answer_alone_in_one_process_too(
    verb: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"predict": ["--micro-batch", "2", "--gpu", "t4"], "check": []}[verb]
    spec = "loud.py:prints_in_build"
    assert main([verb, spec, *options, "--json", "-", "--no-isolate"]) == 0
    out, err = capfd.readouterr()
    json.loads(out)
    assert err.count("loud") >= 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exits", "Net failed at micro-batch 2: it ended the process by sys.exit(0)"),
        ("leaves", "the probe ended with exit code 0 before its first trial"),
        ("crashes", "the probe died of SIGSEGV while micro-batch 2 ran"),
    ],
)
def test_code_that_ends_the_process_has_failed(name: str, words: str, folder: Path) -> None:
    done = run("predict", f"s.py:{name}", "--micro-batch", "2", "--gpu", "t4")
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("autobatch: error: ") and words in last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "spec", "end", "shown"),
    [
        ({}, "s.py:fails", "size 2 (s.py:{fails} in <lambda>)", 3),
        ({}, "s.py:fails --no-isolate", "size 2 (s.py:{fails} in <lambda>)", 3),
        ({}, "s.py:cannot_be_built", "division by zero (s.py:{cannot_be_built} in <lambda>)", 3),
        ({"a.py": "import not_there\n"}, "a.py:f", "'not_there' (a.py:1)", 1),
        ({"a.py": "import not_there\n"}, "a.py:f --no-isolate -q", "'not_there' (a.py:1)", 0),
        (
            {"pkg/__init__.py": "", "pkg/m.py": "\nimport pkg.not_there\n"},
            "pkg.m:f",
            "'pkg.not_there' (pkg/m.py:2)",
            1,
        ),
        ({"a.py": "def f():\n    return f()\n"}, "a.py:f", "exceeded (a.py:2 in f)", 4),
        ({"a.py": "def f(:\n"}, "a.py:f", "(a.py, line 1)", 1),
    ],
)
def test_an_error_in_the_users_code_ends_with_the_users_line(
    files: dict[str, str], spec: str, end: str, shown: int, folder: Path
) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    numbers = {line.partition(" = ")[0]: number for number, line in enumerate(SPEC.splitlines(), 1)}
    done = run("predict", *spec.split(), "--micro-batch", "2", "--gpu", "t4")
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("autobatch: error: ")
    assert lines[-1].endswith(end.format(**numbers))
    assert sum(line.startswith('  File "') for line in lines) <= shown
    assert len(lines) == 1 or "-q" not in spec
    assert not any(word in done.stderr for word in ("Traceback", "autobatch/", "torch/", "<frozen"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_settings_with_which_pytorch_cannot_be_imported_are_named(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "expandable_segments")
    if subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0:
        pytest.skip("this build of PyTorch reads no settings as it is imported")
    for command in (["doctor"], ["probe", "s.py:fails", "--target", "8", "--gpu", "t4"], ["gpus"]):
        done = run(*command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"autobatch: error: {name} is 'expandable_segments', with")
        assert "key:value" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_crash_is_not_blamed_on_cuda_where_there_is_none(folder: Path) -> None:
    done = run("check", "s.py:crashes")
    assert done.returncode == 1
    assert "run these by themselves" in done.stderr and "CUDA_LAUNCH" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "to", "code", "told"),
    [
        (signal.SIGINT, os.kill, 130, "autobatch: interrupted"),
        (signal.SIGINT, os.killpg, 130, "autobatch: interrupted"),
        (signal.SIGTERM, os.kill, 143, "autobatch: terminated"),
    ],
    ids=["Ctrl-C to the parent", "Ctrl-C to all of a terminal", "SIGTERM"],
)
@pytest.mark.parametrize("ignored", [False, True], ids=["", "Ctrl-C ignored"])
def test_an_interrupt_is_told_in_a_line_and_leaves_nothing_behind(
    sent: signal.Signals,
    to: Callable[[int, int], None],
    code: int,
    told: str,
    ignored: bool,
    folder: Path,
) -> None:
    if ignored and sent == signal.SIGINT:
        pytest.skip("then nothing happens")
    options = ["--target", "8", "--gpu", "t4", "--report", "out/report"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else None
    try:
        with (folder / "err").open("w") as err:
            child = subprocess.Popen(
                [sys.executable, "-m", "autobatch", "probe", "s.py:waits", *options],
                stdout=subprocess.PIPE,
                stderr=err,
                start_new_session=True,
            )
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    try:
        wait_until(lambda: "micro-batch 2" in (folder / "err").read_text())
        to(child.pid, sent)
        out, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (child.returncode, out) == (code, b"")
    said = (folder / "err").read_text()
    assert said.splitlines()[-1] == told and "Traceback" not in said
    assert not (folder / "out").exists()
    assert list((folder / "cache" / "probes").iterdir()) == []
    wait_until(lambda: not running_in(child.pid))


@pytest.mark.slow
def test_an_answer_that_is_known_is_given_without_the_users_code(folder: Path) -> None:
    (folder / "once.py").write_text(
        "from torch import nn\nopen('ran', 'a').write('x')\n"
        "def build():\n    return nn.Linear(4, 1)\n"
    )
    command = ["probe", "once.py:build", "--target", "8", "--gpu", "t4", "--json", "-"]
    first, second = run(*command), run(*command)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert json.loads(first.stdout)["answer"] == json.loads(second.stdout)["answer"]
    assert (folder / "ran").read_text() == "x"
