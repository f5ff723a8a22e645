"""Programs of tests, run in child processes on simulated cards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from tests.bench.card import environment, reason_it_cannot_run
from tests.support import ROOT

__all__ = ["answer", "needs_bench", "run"]

needs_bench = pytest.mark.skipif(
    reason_it_cannot_run() is not None, reason=reason_it_cannot_run() or ""
)


def run(
    command: Sequence[object],
    *,
    variables: dict[str, str] | None = None,
    timeout_s: float = 300,
    **card: Any,
) -> str:
    """Run a command of Python's on cards (`environment`); return what it printed.

    Raises:
        AssertionError: it failed; the message has what it printed.
    """
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**environment(**card), "PYTHONPATH": str(ROOT), **(variables or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def answer(program: str, *arguments: object, **options: Any) -> Any:
    """Run a module of `tests.bench.programs` on cards; return the JSON in its last line."""
    said = run(["-m", f"tests.bench.programs.{program}", *arguments], **options)
    return json.loads(said.splitlines()[-1])
