"""The tests that need a GPU (`pytest -m gpu`): the contract of devices, exact ceilings, and more.

What they ask of values holds here as well, or asks `is_on_the_bench`.
"""

from __future__ import annotations

import re

import pytest

from tests.bench.children import needs_bench, run
from tests.support import ROOT

pytestmark = needs_bench


@pytest.mark.slow
def test_every_test_that_needs_a_gpu_passes() -> None:
    texts = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    files = [path for path, text in texts.items() if re.search(r"mark\.gpu\b|\bKINDS\b", text)]
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--no-header"]
    said = run(["-m", "pytest", *options, *files], timeout_s=600)
    passed = re.search(r"(\d+) passed", said)
    assert "skipped" not in said
    assert passed is not None and int(passed[1]) >= 50, said
