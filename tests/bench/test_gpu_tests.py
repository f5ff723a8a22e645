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


@pytest.mark.slow
def test_another_card_is_simulated_as_on_a_machine_without_one() -> None:
    virtual = ROOT / "tests" / "devices" / "virtual"
    names = ("test_cuda_types.py", "test_function_mode.py", "kernels/test_attention.py")
    files = [virtual / name for name in names]
    shared = virtual / "test_sharing.py"
    asking = [
        f"{shared}::test_a_run_that_asks_for_its_card_is_not_shared",
        f"{shared}::test_code_that_builds_a_model_is_seen_to_ask",
    ]
    said = run(["-m", "pytest", "-p", "no:cacheprovider", "--no-header", *files, *asking])
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None and int(passed[1]) >= 30, said
