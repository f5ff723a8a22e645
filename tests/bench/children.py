"""Programs of tests, run in child processes on simulated cards."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tests.bench.card import environment, reason_it_cannot_run
from tests.support import ROOT

__all__ = ["needs_bench", "said"]

needs_bench = pytest.mark.skipif(
    reason_it_cannot_run() is not None, reason=reason_it_cannot_run() or ""
)


def said(program: str, *arguments: object, timeout_s: float = 120, **card: object) -> str:
    """Run Python on cards (`environment`); return what it printed.

    Raises:
        AssertionError: it failed; the message has what it printed.
    """
    variables = environment(**card)  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        cwd=ROOT,
        env={**variables, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
