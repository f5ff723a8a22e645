from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autobatch.errors import (
    AutobatchError,
    DoesNotFitError,
    FileError,
    ProbeDiedError,
    UsageError,
    WorkloadError,
)
from autobatch.records.codec import decode, parse_json
from autobatch.records.progress import Progress
from autobatch.support import process
from autobatch.support.files import user_folder
from autobatch.tuning import isolation
from autobatch.tuning.isolation import RemoteTraceback, apart
from tests.support import isolated_work
from tests.support.plans import example_plan

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(autouse=True)
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which a probe that died leaves its log."""
    monkeypatch.setenv("AUTOBATCH_CACHE_DIR", str(tmp_path / "cache"))
    assert user_folder().is_relative_to(tmp_path)
    return user_folder() / "probes"


def logged(records: Path) -> list[dict[str, Any]]:
    (log,) = records.glob("*/log.jsonl")
    return [dict(parse_json(line)) for line in log.read_text().splitlines()]  # type: ignore[call-overload]


@contextmanager
def running(path: Path, text: str) -> Iterator[subprocess.Popen[str]]:
    """Run a script in a process group of its own, of which nothing is left afterwards."""
    path.write_text(text)
    with subprocess.Popen(
        [sys.executable, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as script:
        try:
            yield script
        finally:
            with suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_the_plan_of_the_child_comes_back_equal_and_its_folder_goes(records: Path) -> None:
    assert apart(isolated_work.answers, others_bytes=5) == example_plan(others_bytes=5)
    assert list(records.iterdir()) == []


def test_progress_arrives_in_order_with_its_trials() -> None:
    heard: list[Progress] = []
    apart(isolated_work.answers, progress=heard.append)
    assert heard == isolated_work.steps_of_two_trials()


def test_the_start_method_stays_the_callers_to_choose() -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    apart(isolated_work.prints)
    assert multiprocessing.get_start_method(allow_none=True) == before


@pytest.mark.parametrize("ours", [True, False])
def test_the_child_is_ours_where_the_parent_is(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_ours", ours)
    plan = apart(isolated_work.says_whose_process_it_is)
    assert plan.warnings == ("ours" if ours else "a guest's",)


def test_what_the_child_prints_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    apart(isolated_work.prints)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "from python\nfrom C\n"


def test_a_folder_that_cannot_be_written_is_replaced_by_a_temporary_one(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.parent.mkdir(parents=True, exist_ok=True)
    records.write_text("in the way")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ProbeDiedError) as caught:
        apart(isolated_work.dies_at_once)
    (folder,) = set(tmp_path.iterdir()) - set(before)
    assert str(folder / "log.jsonl") in str(caught.value)
    assert "before its first trial; finished trials: 0;" in str(caught.value)


def test_a_death_by_signal_names_the_size_and_leaves_the_trials_on_disk(
    records: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ProbeDiedError) as caught:
        apart(isolated_work.dies_by, signal.SIGSEGV)
    (log,) = records.glob("*/log.jsonl")
    assert str(caught.value) == (
        "the probe died of SIGSEGV while micro-batch 64 ran (measuring); finished trials: 2, "
        "the largest that fitted: micro-batch 3 with accumulation steps 4; "
        f"its log is {str(log)!r}; "
        "set CUDA_LAUNCH_BLOCKING=1 to see the operation that fails, or ask for less"
    )
    assert [line["trial"]["micro_batch"] for line in logged(records) if "trial" in line] == [2, 3]
    assert decode(Progress, logged(records)[-1]["progress"]).micro_batch == 64
    assert list(log.parent.iterdir()) == [log]
    assert "in dies_by" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("work", "arguments", "what"),
    [
        (isolated_work.dies_by, (signal.SIGKILL,), "died of SIGKILL while micro-batch 64 ran"),
        (isolated_work.dies_by, (signal.SIGRTMIN + 1,), "ended with exit code -35"),
        (
            isolated_work.dies_between_trials,
            (),
            "ended with exit code 7 after the trial of micro-batch 3 with accumulation steps 4",
        ),
        (isolated_work.leaves, (), "ended with exit code 4 while searching; finished trials: 0;"),
    ],
)
def test_a_death_says_what_ended_it_and_when(
    work: Any, arguments: tuple[int, ...], what: str
) -> None:
    with pytest.raises(ProbeDiedError, match=what) as caught:
        apart(work, *arguments)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("deaf_to", [None, signal.SIGTERM])
def test_a_child_that_hangs_is_ended(
    deaf_to: int | None, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    ticks = itertools.count()
    clock = SimpleNamespace(
        strftime=time.strftime, monotonic=lambda: next(ticks) if pid_file.exists() else 0
    )
    monkeypatch.setattr(isolation, "time", clock)
    monkeypatch.setattr(isolation, "_GRACE_S", 0.2)
    with pytest.raises(ProbeDiedError, match=r"no answer for 2 s while micro-batch 2 ran"):
        apart(isolated_work.sleeps, pid_file, deaf_to, time_limit=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert len(logged(records)) == 1


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [
        ("WorkloadError", WorkloadError, "the model raised KeyError"),
        ("DoesNotFitError", DoesNotFitError, "not even micro-batch 1 fits"),
        ("StrangeUsageError", UsageError, "headroom is 'x'"),
        ("another", WorkloadError, "the probe raised ZeroDivisionError: of a kind"),
    ],
)
def test_errors_cross_over_as_what_they_are(
    kind: str, expected: type[AutobatchError], message: str, records: Path
) -> None:
    with pytest.raises(expected) as caught:
        apart(isolated_work.fails, kind)
    assert type(caught.value) is expected
    assert str(caught.value) == message
    assert list(records.iterdir()) == []


def test_the_traceback_of_the_cause_crosses_over() -> None:
    with pytest.raises(WorkloadError) as caught:
        apart(isolated_work.fails, "WorkloadError")
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    text = str(caught.value.__cause__)
    assert text.startswith("\nTraceback (most recent call last)")
    assert "KeyError: 'missing layer'" in text and "isolated_work.py" in text
    with pytest.raises(DoesNotFitError) as without:
        apart(isolated_work.fails, "DoesNotFitError")
    assert without.value.__cause__ is None


def test_what_cannot_be_pickled_is_named_with_a_way_out(records: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"others_bytes \(a generator\) and loss \(a function\) cannot be sent .* top level",
    ) as caught:
        apart(isolated_work.answers, others_bytes=(n for n in ""), loss=lambda model, batch: 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"number \(a generator\) cannot be sent"):
        apart(isolated_work.dies_by, (n for n in ""))
    assert list(records.iterdir()) == []


def test_what_cannot_be_rebuilt_in_the_child_is_a_usage_error(records: Path) -> None:
    with pytest.raises(
        UsageError, match=r"cannot rebuild what it was sent \(LookupError: no such layer here"
    ) as caught:
        apart(isolated_work.answers, isolated_work.Unloadable())
    assert "in rebuild" in str(caught.value.__cause__)
    assert list(records.iterdir()) == []


def test_a_full_disk_is_an_error_about_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(isolation, "_pickle", full)
    with pytest.raises(FileError, match="No space left on device"):
        apart(isolated_work.answers)


def test_a_callback_that_raises_ends_the_child(tmp_path: Path) -> None:
    def fail(step: Progress) -> None:
        wait_until(pid_file.exists)
        raise BrokenPipeError

    pid_file = tmp_path / "pid"
    with pytest.raises(BrokenPipeError):
        apart(isolated_work.sleeps, pid_file, progress=fail)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


GUARDED = """
import sys
from pathlib import Path
from tests.support import isolated_work
from autobatch.tuning.isolation import apart

if __name__ == "__main__":
    try:
        apart(isolated_work.{work}, Path(__file__).with_name("pid"))
    except KeyboardInterrupt:
        sys.exit(7)
"""


@linux_only
@pytest.mark.parametrize("to", [os.kill, os.killpg], ids=["parent", "both"])
def test_an_interrupt_goes_on_and_leaves_no_child_behind(
    to: Callable[[int, int], None], records: Path, tmp_path: Path
) -> None:
    with running(tmp_path / "script.py", GUARDED.format(work="sleeps")) as script:
        wait_until((tmp_path / "pid").exists)
        to(script.pid, signal.SIGINT)
        out, err = script.communicate(timeout=20)
        assert (script.returncode, out, err) == (7, "", "")
        assert not is_running(int((tmp_path / "pid").read_text()))
    assert list(records.iterdir()) == []


@linux_only
@pytest.mark.parametrize("work", ["sleeps", "sleeps_unknown_to_the_kernel"])
def test_a_parent_that_is_killed_leaves_no_child_behind(work: str, tmp_path: Path) -> None:
    with running(tmp_path / "script.py", GUARDED.format(work=work)) as script:
        wait_until((tmp_path / "pid").exists)
        assert is_running(int((tmp_path / "pid").read_text()))
        script.kill()
        script.communicate(timeout=20)
        wait_until(lambda: not is_running(int((tmp_path / "pid").read_text())))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("apart(isolated_work.answers)", "the script has no guard: put what the script does"),
        (
            "if __name__ != '__main__': sys.exit()\napart(isolated_work.answers)",
            "ended before the probe began (exit code 0), while it imported the script: put what",
        ),
    ],
)
def test_a_script_that_cannot_be_imported_again_is_told_so_in_one_line(
    text: str, message: str, records: Path, tmp_path: Path
) -> None:
    imports = (
        "import sys\nfrom autobatch.tuning.isolation import apart\n"
        "from tests.support import isolated_work\n"
    )
    with running(tmp_path / "script.py", imports + text) as script:
        _, err = script.communicate(timeout=20)
    *above, last = err.splitlines()
    assert last.startswith("autobatch.errors.UsageError: ") and message in last
    assert sum(line.startswith("Traceback") for line in above) == 1
    assert list(records.iterdir()) == []


def test_processes_that_may_not_have_children_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    this = multiprocessing.current_process()
    monkeypatch.setitem(this._config, "daemon", True)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="cannot have children: leave isolate out"):
        apart(isolated_work.answers)
    monkeypatch.setattr(this, "_inheriting", True, raising=False)
    with pytest.raises(UsageError, match="no guard"):
        apart(isolated_work.answers)
