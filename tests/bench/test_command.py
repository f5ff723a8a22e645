"""The command line without a card's name: it measures the GPU that is there, in a child process."""

from __future__ import annotations

import json

import pytest

from autobatch.support.units import GIB
from tests.bench.children import needs_bench, run

pytestmark = needs_bench


@pytest.mark.slow
def test_probe_measures_the_gpu_in_the_machine(tmp_path) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "plan.json"
    spec = "hf:gpt2?seq=128&n_layer=2&n_embd=256&n_head=4&vocab_size=5000"
    command = ["-m", "autobatch", "probe", spec, "--target", 512, "--json", path]
    said = run(command, gpu="l4", capacity="2GiB")
    plan = json.loads(path.read_text())
    assert "NVIDIA L4" in said and "(measured)" in said
    assert plan["gpu"]["capacity_bytes"] == 2 * GIB
    assert {trial["evidence"] for trial in plan["trials"]} == {"measured"}


def test_gpus_lists_the_cards_of_the_machine() -> None:
    said = run(["-m", "autobatch", "gpus"], gpu="h200", cards=2)
    assert said.count("NVIDIA H200") == 2
