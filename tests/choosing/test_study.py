"""Configurations in a study that several processes share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

import optuna
from optuna.trial import TrialState

from autobatch.choosing import study as module
from autobatch.choosing import workers
from autobatch.choosing.samplers import Point, points_at, sampler_named
from autobatch.choosing.study import SweepStudy
from autobatch.errors import FileError, UsageError
from tests.support import ROOT
from tests.support.sweeps import LETTERS, QUESTION, SIZES, suggest

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(params=["sqlite", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'sweep.db'}"
    return str(tmp_path / "sweep.journal")


def opened(storage: Any, question: dict[str, Any] = QUESTION, **options: Any) -> SweepStudy:
    return SweepStudy.open(storage, "test", question, **options)


def point(letter: str = "a", size: int = 8) -> Point:
    (one,) = points_at(suggest, [{"letter": letter, "micro-batch": size}])
    return one


def raw(storage: str) -> list[optuna.trial.FrozenTrial]:
    opened_again = storage
    if "://" not in storage:
        backend = optuna.storages.journal.JournalFileBackend(storage)
        opened_again = optuna.storages.JournalStorage(backend)
    return optuna.load_study(study_name="test", storage=opened_again).get_trials()


def test_a_configuration_is_had_once_until_it_is_cut(storage: str) -> None:
    first, second = opened(storage), opened(storage)
    id_ = first.claim(point(), {"steps": 3})
    assert id_ is not None
    assert second.claim(point(), {}) is None
    assert second.claim(point("b"), {}) is not None
    assert first.finish(id_, (1.5, 7.0), {"executions": 1})
    assert second.claim(point(), {}) is None
    (seen,) = [each for each in second.seen() if each.is_done]
    assert (seen.params, seen.values) == ({"letter": "a", "micro-batch": 8}, (1.5, 7.0))
    assert (seen.facts["steps"], seen.facts["executions"]) == (3, 1)


def test_of_two_trials_of_one_configuration_the_later_withdraws(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both workers look before either of them writes."""
    first, second = opened(storage), opened(storage)
    id_ = first.claim(point(), {})
    looked = SweepStudy.seen
    blind = iter([True])
    monkeypatch.setattr(SweepStudy, "seen", lambda self: [] if next(blind, False) else looked(self))
    assert second.claim(point(), {}) is None
    assert [each.id for each in first.seen()] == [id_]
    assert [trial.state for trial in raw(storage)] == [TrialState.RUNNING, TrialState.FAIL]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["claim", "sample"])
def test_processes_at_one_study_never_run_a_configuration_twice(
    storage: str, what: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tests.support.sweeps", what, storage, str(log), "0.002"]
    workers = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    while sum(Path(f"{log}.{worker.pid}").exists() for worker in workers) < 3:
        time.sleep(0.01)
    Path(f"{log}.go").touch()
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    ran = Counter(line.partition(" ")[2] for line in log.read_text().splitlines())
    assert set(ran.values()) == {1}
    if what == "claim":
        assert len(ran) == len(LETTERS) * len(SIZES)


def test_a_sampler_waits_for_earlier_trials_that_have_not_chosen(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(storage, sampler=sampler_named("random"))
    second = opened(storage)
    chosen: list[int | None] = []

    def choose(trial: Any) -> None:
        """Another worker claims the configuration while the sampler's trial is without one."""

        def sleep(seconds: float) -> None:
            chosen.append(None)  # it waits
            monkeypatch.setattr(module.time, "sleep", lambda _: None)
            storage_ = first._storage
            storage_.set_trial_user_attr(first.seen()[0].id, "configuration", wanted.key)

        wanted = point()
        trial.suggest_categorical("letter", list(LETTERS))
        trial.suggest_categorical("micro-batch", list(SIZES))
        wanted = Point(params=trial.params, distributions=trial.distributions)
        monkeypatch.setattr(module.time, "sleep", sleep)
        chosen.append(second.claim(wanted, {}))

    id_, _ = first.sample(choose)
    assert id_ is not None
    assert chosen == [None, None]


def test_an_error_while_a_trial_runs_cuts_it(storage: str) -> None:
    study = opened(storage)
    id_ = study.claim(point(), {})
    assert id_ is not None
    with pytest.raises(KeyboardInterrupt), study.running(id_):
        raise KeyboardInterrupt
    assert study.seen() == []
    assert study.claim(point(), {}) is not None


def test_what_failed_or_was_pruned_is_not_claimed_again(storage: str) -> None:
    study = opened(storage)
    study.skip(point("a"), {"reason": "too large"})
    id_ = study.claim(point("b"), {})
    assert id_ is not None and study.prune(id_, "failed", {"reason": "it raised"})
    assert study.claim(point("a"), {}) is None
    assert study.claim(point("b"), {}) is None
    outcomes = [each.facts["outcome"] for each in study.seen()]
    assert outcomes == ["pruned", "failed"]


@linux_only
@pytest.mark.slow
def test_the_trial_of_a_killed_process_is_cut_at_once(storage: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    Path(f"{log}.go").touch()
    command = [sys.executable, "-m", "tests.support.sweeps", "claim", storage, str(log), "60"]
    worker = subprocess.Popen(command, cwd=ROOT)
    while not log.exists():
        time.sleep(0.01)
    study = opened(storage)
    study.release_cut(study.seen())
    assert study.claim(point(), {}) is None
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    study.release_cut(study.seen())
    assert study.seen() == []
    assert study.claim(point(), {}) is not None


def test_a_worker_elsewhere_counts_as_dead_when_it_gives_no_sign_of_life(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = opened(storage)
    far._workers.me["machine"] = "another"
    id_ = far.claim(point(), {})
    here = opened(storage)
    now = time.monotonic()
    monkeypatch.setattr(workers.time, "monotonic", lambda: now)
    assert [each.is_cut for each in here.seen()] == [False]
    now += 59
    assert [each.is_cut for each in here.seen()] == [False]
    far._storage.set_trial_user_attr(id_, "beat", 1)
    assert [each.is_cut for each in here.seen()] == [False]
    now += 59
    assert [each.is_cut for each in here.seen()] == [False]
    now += 2
    assert [each.is_cut for each in here.seen()] == [True]
    here.release_cut(here.seen())
    assert here.seen() == []
    assert id_ is not None and not far.finish(id_, (1.0, 1.0), {})


def test_a_running_trial_gives_signs_of_life(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_BEAT_S", 0.01)
    study = opened(storage)
    id_ = study.claim(point(), {})
    assert id_ is not None
    with study.running(id_):
        while not raw(storage)[0].user_attrs.get("beat"):
            time.sleep(0.01)


def test_a_study_about_something_else_is_refused_and_left_alone(storage: str) -> None:
    opened(storage, {"target": 64, "model": "x" * 80})
    before = raw(storage)
    with pytest.raises(UsageError, match=r"target: 64 there, 32 here, model\): begin anew with"):
        opened(storage, {"target": 32, "model": "y" * 80})
    assert raw(storage) == before
    opened(storage, {"target": 64, "model": "x" * 80})


def test_a_study_that_is_none_of_a_sweep_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'own.db'}"
    study = optuna.create_study(study_name="test", storage=url)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(UsageError, match="is none of a sweep: begin anew with"):
        opened(url)


def test_trials_of_another_question_in_the_study_are_refused(storage: str) -> None:
    """Two workers may have begun the study at one instant, each with a question of its own."""
    first = opened(storage)
    first.claim(point(), {})
    second = opened(storage)
    second._digest = "another"
    with pytest.raises(UsageError, match=r"trial 0 of the study 'test' in .* is about another"):
        second.seen()


@pytest.mark.parametrize(
    "storage",
    ["sqlite:////dev/null/x.db", "nosuch://x", "/dev/null/x.journal", "/", __file__],
)
def test_a_storage_that_cannot_be_opened_is_one_line(storage: str) -> None:
    with pytest.raises(FileError, match=r"cannot open the storage '.*': .*; name one such as") as e:
        opened(storage)
    assert "\n" not in str(e.value)


def test_a_storage_that_is_none_is_refused() -> None:
    for wrong in (5, "", b""):
        with pytest.raises(UsageError, match="storage is"):
            opened(wrong)


def test_a_storage_of_optuna_can_be_passed() -> None:
    shared = optuna.storages.InMemoryStorage()
    assert opened(shared).claim(point(), {}) is not None
    assert opened(shared).claim(point(), {}) is None


def test_optuna_says_nothing_and_keeps_its_verbosity(
    capsys: pytest.CaptureFixture[str], storage: str
) -> None:
    before = optuna.logging.get_verbosity()
    opened(storage)
    assert optuna.logging.get_verbosity() == before
    assert capsys.readouterr().err == ""
