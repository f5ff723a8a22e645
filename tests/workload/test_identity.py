"""What is found alike in another process, and what is not."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import threading
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autobatch.workload.identity import identity_of
from tests.support import ROOT

NORM = 1.0


def of(value: Any) -> dict[str, str]:
    return identity_of({"lever": value})


def made(norm: Any, *, code: str = "setup.having(clip_norm=norm)") -> Any:
    """Return a lever of one code, which reads what it was made with."""
    names: dict[str, Any] = {"norm": norm}
    exec(f"def lever(trial):\n    '''One.'''\n    return lambda setup: {code}", names)
    return names["lever"]


class Lever:
    def __init__(self, norm: float) -> None:
        self.norm = norm
        self.unread = uuid.uuid4().hex
        self.lock = threading.Lock()
        self.place = id(self)

    def __call__(self, trial: Any) -> Any:
        logging.getLogger(__name__).debug("%s %s", self.place, self.lock)
        return lambda setup: setup.having(clip_norm=self.norm)


class Other(Lever):
    def __call__(self, trial: Any) -> Any:
        return lambda setup: setup.having(clip_norm=2 * self.norm)


def wide(trial: Any, kind: Any = None, share: Any = None) -> Any:
    return lambda setup: setup.having(optimizer=kind)


def defaulting(norm: float) -> Any:
    def lever(trial: Any, norm: float = norm) -> Any:
        return norm

    return lever


def enclosing(norm: Any) -> Any:
    return lambda trial: norm


class Mine(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Changed(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return None


Changed.__name__, Changed.__qualname__ = Mine.__name__, Mine.__qualname__


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (made(1.0), made(2.0)),
        (made(1.0), made(1.0, code="setup.having(clip_norm=norm + 1)")),
        (lambda trial: 1, lambda trial: 2),
        (lambda trial: trial in {1, 2}, lambda trial: trial in {1, 3}),
        (partial(wide, kind=torch.optim.SGD), partial(wide, kind=torch.optim.Adam)),
        (partial(wide, kind=partial(Mine, lr=1)), partial(wide, kind=partial(Mine, lr=2))),
        (partial(wide, kind=Mine), partial(wide, kind=Changed)),
        (partial(wide, share={"a": [1, 2]}), partial(wide, share={"a": [1, 3]})),
        (partial(wide, share=torch.zeros(2)), partial(wide, share=torch.zeros(3))),
        (partial(wide, kind=nn.Linear(2, 2)), partial(wide, kind=nn.Linear(2, 3))),
        (partial(wide, kind=Mine, share=Changed), partial(wide, kind=Changed, share=Mine)),
        (defaulting(1.0), defaulting(2.0)),
        (enclosing(1.0), enclosing(2.0)),
        (enclosing(made(1.0)), enclosing(made(2.0))),
        (Lever(1.0), Lever(2.0)),
        (Lever(1.0), Other(1.0)),
        (Lever(1.0).__call__, Lever(2.0).__call__),
    ],
)
def test_what_does_something_else_is_another(one: Any, other: Any) -> None:
    assert of(one) != of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (made(1.0), made(1.0)),
        (Lever(1.0), Lever(1.0)),
        (enclosing(object()), enclosing(object())),
        (enclosing(2**63 + 1), enclosing(2**62)),
        (enclosing(f"{object()}"), enclosing(f"{object()}")),
        (enclosing(torch.rand(3)), enclosing(torch.rand(3))),
        (enclosing(nn.Linear(2, 2)), enclosing(nn.Linear(2, 2))),
        (enclosing(torch.Generator()), enclosing(torch.Generator())),
        (enclosing(list(range(200))), enclosing([*range(1, 201)])),
    ],
)
def test_what_a_process_draws_anew_makes_no_difference(one: Any, other: Any) -> None:
    assert of(one) == of(other)


def test_a_docstring_and_the_place_of_a_function_make_no_difference() -> None:
    one, other = {}, {}  # type: dict[str, Any], dict[str, Any]
    exec("def lever(trial):\n    '''One.'''\n    return 1", one)
    exec("\n\ndef lever(trial):\n    '''Another.'''\n    # new\n    return 1", other)
    assert of(one["lever"]) == of(other["lever"])


def test_of_a_bag_of_arguments_those_count_that_code_reads() -> None:
    def lever(args: Any) -> Any:
        return lambda trial: args.norm

    def bag(**given: Any) -> Any:
        return lever(argparse.Namespace(**given))

    assert of(bag(norm=1, seed=1)) == of(bag(norm=1, seed=2))
    assert of(bag(norm=1, seed=1)) != of(bag(norm=2, seed=1))


def test_a_global_counts_where_code_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def clip(trial: Any) -> Any:
        return lambda setup: setup.having(clip_norm=NORM)

    before, apart = of(clip), of(enclosing(1))
    monkeypatch.setattr(sys.modules[__name__], "NORM", 2.0)
    assert of(clip) != before and of(enclosing(1)) == apart
    assert before["lever: NORM"] == "1.0"


class Hostile:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("mine")

    def __repr__(self) -> str:
        raise RuntimeError("mine")


def test_what_cannot_be_looked_at_or_has_no_end_counts_by_what_it_is() -> None:
    endless: list[Any] = []
    endless.append(endless)
    chain: list[Any] = []
    for _ in range(5_000):
        chain = [chain]
    assert any("Hostile" in part for part in of(enclosing(Hostile())).values())
    assert of(enclosing(endless)) == of(enclosing(endless))
    assert of(enclosing(chain)) == of(enclosing(chain))


@pytest.mark.slow
def test_another_process_finds_the_same(tmp_path: Path) -> None:
    code = (
        "import json, tests.workload.test_identity as t; from functools import partial; "
        "values = t.Lever(1.0), partial(t.wide, kind=t.Mine, share={'a', 'b', 'c', 'd'}), "
        "lambda trial: trial in {'a', 'b', 'c', 'd'}; print(json.dumps([*map(t.of, values)]))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    }
    assert len(found) == 1
