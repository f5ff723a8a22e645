"""What is promised of levers is what PyTorch's CUDA code allocates, on a simulated runtime."""

from __future__ import annotations

import json

import pytest

from tests.bench.children import needs_bench, run
from tests.levers.setups import RUNS, options_of, peaks, setup_of

pytestmark = [needs_bench, pytest.mark.slow]

CASES = [
    ("transformer", "checkpointing: every block"),
    ("transformer", "checkpointing: every 2nd block"),
    ("transformer", "checkpointing: selective"),
    ("transformer", "optimizer: for-loop"),
    ("transformer", "optimizer: fused"),
    ("transformer", "allocator: expandable segments"),
    ("transformer", "offload: activations"),
    ("llama", "none"),
    ("llama", "loss: 8 chunks"),
    ("llama", "lora: rank 16, all linear"),
    ("llama", "checkpointing: every block"),
    ("half llama", "none"),
    ("half llama", "attention-kernel: memory-efficient"),
]


@pytest.mark.parametrize(("name", "label"), CASES)
def test_pytorchs_cuda_code_allocates_what_was_promised(name: str, label: str) -> None:
    if label.startswith("lora"):
        pytest.importorskip("peft")
    setup = setup_of(RUNS[name]())
    promised = setup if label == "none" else options_of(setup)[label].apply(setup)
    variables, applied = {}, label
    if promised.settings.expandable_segments:
        variables["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        applied = "none"  # beside what is set before the process begins
    said = run(
        ["-m", "tests.levers.on_the_bench", name, applied],
        gpu="a100-40gb",
        capacity="2GiB",
        variables=variables,
    )
    with promised.in_force():
        assert tuple(json.loads(said.splitlines()[-1])) == peaks(promised)
