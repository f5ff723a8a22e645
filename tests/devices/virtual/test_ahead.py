"""Helpers that run ahead: what they send, what happens where they fail, and how they end."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from autobatch.devices.virtual import ahead
from autobatch.devices.virtual.ahead import run_ahead, running_ahead, taken

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="helpers are forked on Linux alone")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be a core for a helper, and no GPU."""
    monkeypatch.setattr(ahead, "_cores", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return where helpers leave what they find."""
    return tmp_path / "ahead"


@pytest.fixture
def helped(folder: Path) -> Iterator[None]:
    """Run a test where helpers run ahead."""
    with running_ahead(folder):
        yield


def _process() -> tuple[int]:
    time.sleep(0.05)
    return (os.getpid(),)


def _begun(key: object) -> Any:
    """Wait until a helper has begun with a task, and take its result."""
    assert ahead._running is not None
    (tasks,) = ahead._running.lists
    while not tasks._claims[tasks.keys[key]]:
        time.sleep(0.01)
    return taken(key)


def test_a_helper_does_what_was_foreseen_in_a_process_of_its_own(helped: None) -> None:
    run_ahead([("a", _process), ("b", _process)])
    first, second = _begun("a"), _begun("b")
    assert first == second != (os.getpid(),)
    assert taken("a") is None, "a result is given once"


def test_what_no_helper_has_begun_is_left_to_this_process(helped: None) -> None:
    run_ahead([("slow", lambda: time.sleep(60)), ("next", _process)])
    assert taken("next") is None
    assert taken("unknown") is None


def test_ops_arrive_as_themselves(helped: None) -> None:
    run_ahead([("op", lambda: {"op": torch.ops.aten.add.Tensor})])
    assert _begun("op")["op"] is torch.ops.aten.add.Tensor


def _fails() -> None:
    raise RuntimeError("out of ideas")


def _dies() -> None:
    os._exit(1)


@pytest.mark.parametrize("run", [_fails, _dies, lambda: None, lambda: lambda: 1])
def test_a_helper_that_has_no_result_leaves_it_to_this_process(
    helped: None, run: Callable[[], Any]
) -> None:
    run_ahead([("it", run)])
    assert _begun("it") is None


def test_a_helper_goes_on_after_a_task_that_failed(helped: None) -> None:
    run_ahead([("bad", _fails), ("good", _process)])
    assert _begun("bad") is None
    assert _begun("good") is not None


def test_no_more_helpers_than_idle_cores(helped: None) -> None:
    run_ahead([("slow", lambda: time.sleep(60))])
    run_ahead([("more", _process)])
    assert ahead._running is not None and len(ahead._running.lists) == 1
    assert len(multiprocessing.active_children()) == 1


def test_where_no_process_can_be_had_this_one_does_it_all(
    helped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fork", refused)
        run_ahead([("it", _process)])
    assert taken("it") is None
    run_ahead([("it", _process)])
    assert _begun("it") is not None


def test_helpers_and_what_they_leave_end_with_the_block(folder: Path) -> None:
    with running_ahead(folder):
        run_ahead([("slow", lambda: time.sleep(60))])
        assert multiprocessing.active_children()
        assert folder.exists()
    assert not multiprocessing.active_children()
    assert not folder.exists()
    run_ahead([("late", _process)])
    assert taken("late") is None


def test_a_helper_that_hangs_is_given_up(helped: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PATIENCE_S", 0.2)
    run_ahead([("hangs", lambda: time.sleep(60)), ("after", _process)])
    assert _begun("hangs") is None
    assert not multiprocessing.active_children()
    assert taken("after") is None


def test_a_default_device_that_is_not_there_is_no_obstacle(folder: Path) -> None:
    torch.set_default_device("cuda:77")
    try:
        with running_ahead(folder):
            run_ahead([("it", _process)])
            assert _begun("it") is not None
    finally:
        torch.set_default_device(None)


def test_a_helper_is_silent(helped: None, capfd: pytest.CaptureFixture[str]) -> None:
    run_ahead([("loud", lambda: print("hello", flush=True) or (1,))])
    assert _begun("loud") == (1,)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("_cores", lambda: 1),
        ("torch.cuda.is_available", lambda: True),
        ("sys.platform", "darwin"),
    ],
)
def test_nothing_is_forked_where_that_is_unsafe_or_useless(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, replacement: Any
) -> None:
    target = f"autobatch.devices.virtual.ahead.{name}" if name == "_cores" else name
    monkeypatch.setattr(target, replacement)
    with running_ahead(folder):
        run_ahead([("it", _process)])
        assert not multiprocessing.active_children()
        assert taken("it") is None


_KILLED = """
import os, pathlib, sys, time
from autobatch.devices.virtual import ahead
ahead._cores = lambda: 2
def slow():
    print(os.getpid(), file=open(sys.argv[1], "w"), flush=True)
    time.sleep(60)
with ahead.running_ahead(pathlib.Path(sys.argv[1] + ".ahead")):
    ahead.run_ahead([("slow", slow)])
    while not os.path.exists(sys.argv[1]) or not open(sys.argv[1]).read().strip():
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_a_helper_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    subprocess.run([sys.executable, "-c", _KILLED, str(told)], check=False)
    stat = Path(f"/proc/{told.read_text().strip()}/stat")
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


_ADVISED = """
import contextlib, json, pathlib, sys
import torch
from torch import nn
import autobatch
from autobatch.devices.virtual import ahead, gpu
ahead._cores = lambda: 2
torch.cuda.is_available = lambda: False
found = []
def noted(key, take=ahead.taken):
    result = take(key)
    found.append(result is not None)
    return result
gpu.taken = noted
model = nn.Sequential(nn.Linear(512, 4096), nn.ReLU(), nn.Linear(4096, 8))
folder = pathlib.Path(sys.argv[2]) / "ahead"
with ahead.running_ahead(folder) if sys.argv[1] == "ahead" else contextlib.nullcontext():
    plan = autobatch.tune(model, target=64, gpu="t4", cache=False)
    advice = autobatch.advise(model, target=4096, gpu="0.75GiB", levers=["optimizer"])
told = [json.loads(plan.to_json()), json.loads(advice.to_json())]
for each in told:
    for varies in ("seconds", "created"):
        each.pop(varies, None)
for trial in told[0]["trials"]:
    trial.pop("seconds")
json.dump({"told": told, "taken": sum(found)}, sys.stdout)
"""


@pytest.mark.slow
def test_answers_are_the_same_with_helpers(tmp_path: Path) -> None:
    """Fresh processes: an autograd that ran with the simulated device known cannot be forked."""
    ways = {
        way: json.loads(
            subprocess.run(
                [sys.executable, "-c", _ADVISED, way, str(tmp_path)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for way in ("ahead", "alone")
    }
    assert ways["ahead"]["told"] == ways["alone"]["told"]
    assert ways["ahead"]["taken"] > 0 == ways["alone"]["taken"]
