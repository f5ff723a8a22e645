"""Sweeps whose configurations run in no time, and processes that work at one study.

As a program: `python -m tests.support.sweeps sweep|claim|sample STORAGE LOG SECONDS`. It waits
until the file LOG.go is there, so that several begin together, and appends what it runs to LOG.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GIB = 2**30
TARGET = 64
QUESTION = {"what": "a test"}
SIZES = (8, 4, 2, 1)
LETTERS = "abcde"


def suggest(trial: Any) -> None:
    trial.suggest_categorical("letter", list(LETTERS))
    trial.suggest_categorical("micro-batch", list(SIZES))


class FakeBench:
    """Knows by formula what each configuration takes, and keeps count."""

    memory = "simulated"
    time = "estimate"
    margin = 0.02
    keeps_settings = False
    budget_bytes = 16 * GIB

    def __init__(self, ran: Callable[[Any], None] = lambda _: None) -> None:
        self.device = SimpleNamespace()
        self.ran: list[tuple[str, int]] = []
        self._told = ran

    def run(self, configuration: Any) -> Any:
        from autobatch.choosing.bench import Tried

        self.ran.append((label_of(configuration), configuration.micro_batch))
        self._told(self.ran[-1])
        seconds, reserved = figures(configuration)
        if reserved > self.budget_bytes:
            return Tried(
                fits=False, reserved_bytes=reserved, seconds=None, reason="it is too large"
            )
        return Tried(fits=True, reserved_bytes=reserved, seconds=seconds)

    def plan(self, configuration: Any) -> Any:
        from tests.support.plans import example_plan

        return example_plan()


def label_of(configuration: Any) -> str:
    return ", ".join(f"{name}: {value}" for name, value in configuration.settings.items())


_LEVERS = {
    "as it is": (1.0, 1.0),
    "every block": (1.3, 0.3),
    "selective": (1.1, 0.5),
}
"""How much longer a run takes with a setting, and the share of its activations that it keeps."""


def figures(configuration: Any) -> tuple[float, int]:
    """Return seconds of a window, and bytes; settings that are not known make both worse."""
    (value,) = configuration.settings.values()
    slower, kept = _LEVERS.get(value, (1.5, 1.1))
    size = configuration.micro_batch
    return slower * (1 + 0.01 * TARGET / size), int(GIB * (1 + 0.5 * size * kept))


def fake_sweep(bench: Any, monkeypatch: Any = None, **options: Any) -> Any:
    """Sweep a small model over a bench."""
    from torch import nn

    from autobatch.choosing import sweep as module

    if monkeypatch is not None:
        monkeypatch.setattr(module, "bench_of", lambda *_: bench)
    else:
        module.bench_of = lambda *_: bench  # type: ignore[assignment]
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)))
    given = {"target": TARGET, "gpu": "t4", "levers": ["checkpointing"]}
    return module.sweep(blocks, **{**given, **options})


def _worker(what: str, storage: str, log: str, seconds: float) -> None:
    def ran(what: object) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {what}\n")
        time.sleep(seconds)

    if what == "sweep":
        from autobatch.choosing import sweep  # noqa: F401
    from autobatch.choosing.samplers import points_at, sampler_named
    from autobatch.choosing.study import SweepStudy

    Path(f"{log}.{os.getpid()}").touch()
    while not Path(f"{log}.go").exists():
        time.sleep(0.005)
    if what == "sweep":
        found = fake_sweep(FakeBench(ran), storage=storage)
        print(len(found.trials), found.executions, [trial.number for trial in found.front])
        return
    study = SweepStudy.open(storage, "test", QUESTION, sampler=sampler_named("random"))
    if what == "claim":
        values = [{"letter": x, "micro-batch": n} for x in LETTERS for n in SIZES]
        for point in points_at(suggest, values):
            if (id_ := study.claim(point, {})) is not None:
                ran(point.key)
                study.finish(id_, (1.0, 1.0), {})
    while what == "sample" and sum(each.is_done for each in study.seen()) < 15:
        id_, proposed = study.sample(suggest)
        if id_ is not None:
            ran(proposed.key)
            study.finish(id_, (1.0, 1.0), {})


if __name__ == "__main__":
    _worker(*sys.argv[1:4], float(sys.argv[4]))
