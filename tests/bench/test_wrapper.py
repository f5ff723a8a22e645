"""`python -m tests.bench` runs any program on cards."""

from __future__ import annotations

import subprocess
import sys

from tests.bench.children import needs_bench
from tests.support import ROOT

pytestmark = needs_bench


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_program_runs_with_its_own_options_and_exit_status() -> None:
    program = "import os, sys; print(os.environ['CARD_COUNT'], sys.argv[1:]); sys.exit(7)"
    done = bench("-g", "l4", "-n", "3", sys.executable, "-c", program, "-g", "own")
    assert (done.returncode, done.stdout) == (7, "3 ['-g', 'own']\n")


def test_what_cannot_be_played_is_one_line() -> None:
    done = bench("-g", "a-hundred", "true")
    assert done.returncode == 2
    assert "GPU 'a-hundred' is not in the catalogue" in done.stderr.splitlines()[-1]
    assert "which program?" in bench("-n", "2").stderr
