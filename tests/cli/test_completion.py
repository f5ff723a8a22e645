from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("autobatch doc", {"doctor"}),
        ("autobatch probe m.py:f --tar", {"--target"}),
        ("autobatch probe m.py:f --gpu rtx-409", {"rtx-4090"}),
        ("autobatch compare m.py:f --gpus t4,a10", {"t4,a10g", "t4,a100-40gb", "t4,a100-80gb"}),
    ],
)
def test_a_shell_is_told_what_could_be_typed(line: str, expected: set[str], tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    file = tmp_path / "said"
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(file),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", "from autobatch.cli import entry; entry()"]
    subprocess.run(command, env=os.environ | environment, check=True, timeout=60)
    assert set(file.read_text().split()) == expected
