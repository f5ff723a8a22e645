"""Interrupts, exits and threads: what happens to the process of a caller."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

import autobatch
from autobatch.errors import WorkloadError
from tests.support import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("call", ["tune", "check"])
def test_an_interrupt_at_any_moment_arrives_and_changes_nothing(call: str) -> None:
    moments = ["0.2", "0.5", "0.75"]
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.interrupted_work", call, *moments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    outcomes = run.stdout.split("\n")[:-1]
    assert len(outcomes) == len(moments)
    assert set(outcomes) <= {"interrupted", "finished before"}, outcomes
    assert "interrupted" in outcomes


def leave(*_: Any) -> Any:
    sys.exit(3)


class Leaving(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return leave(super().forward(x))  # type: ignore[no-any-return]


def build() -> nn.Module:
    leave()
    raise AssertionError


SAMPLE = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (build, {"sample": SAMPLE}),
        (Leaving(4, 1), {"sample": SAMPLE, "loss": lambda m, b: m(b).mean()}),
        (Leaving(4, 1), {}),  # where its inputs are inferred
        (nn.Linear(4, 1), {"sample": SAMPLE, "loss": leave}),
    ],
    ids=["build", "forward", "inference", "loss"],
)
def test_an_exit_in_user_code_is_an_error_of_the_workload(model: Any, options: Any) -> None:
    for ask in (
        lambda: autobatch.tune(model, target=8, gpu="t4", **options),
        lambda: autobatch.predict(model, micro_batch=2, gpu="t4", **options),
    ):
        with pytest.raises(WorkloadError, match=r"sys\.exit\(3\)") as caught:
            ask()
        assert isinstance(caught.value.__cause__, SystemExit)


def test_an_exit_in_what_is_checked_is_an_error_of_the_workload() -> None:
    with pytest.raises(WorkloadError, match=r"sys\.exit\(3\)"):
        autobatch.check_equivalence(nn.Linear(4, 1), torch.randn(8, 4), loss=leave)


def test_threads_may_tune_at_once() -> None:
    def plan() -> tuple[Any, Any]:
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
        found = autobatch.tune(
            model, target=64, sample=torch.zeros(2, 64), loss=lambda m, b: m(b).mean(), gpu="t4"
        )
        return found.ceiling, found.footprint.peak_reserved_bytes

    expected = plan()
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(plan())
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
