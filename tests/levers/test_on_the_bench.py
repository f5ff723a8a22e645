"""What is promised of levers is what PyTorch's CUDA code allocates, on a simulated runtime."""

from __future__ import annotations

import functools
import importlib.util
import json

import pytest

from tests.bench.children import needs_bench, run
from tests.levers.setups import RUNS, options_of, peaks, setup_of

pytestmark = [needs_bench, pytest.mark.slow]

EXPANDABLE = "allocator: expandable segments"

LABELS = {
    "transformer": [
        "checkpointing: every block",
        "checkpointing: every 2nd block",
        "checkpointing: selective",
        "optimizer: for-loop",
        "optimizer: fused",
        EXPANDABLE,
        "offload: activations",
    ],
    "llama": [
        "none",
        "loss: 8 chunks",
        "lora: rank 16, all linear",
        "checkpointing: every block",
    ],
    "half llama": ["none", "attention-kernel: memory-efficient"],
}

CASES = [(name, label) for name, labels in LABELS.items() for label in labels]


def can_run(label: str) -> bool:
    return not label.startswith("lora") or importlib.util.find_spec("peft") is not None


@functools.cache
def on_the_bench(name: str, *labels: str, settings: str = "") -> dict[str, list[int]]:
    """Return the peaks of a run with each of some levers, all of them in one process."""
    said = run(
        ["-m", "tests.levers.on_the_bench", name, *labels],
        gpu="a100-40gb",
        capacity="2GiB",
        variables={"PYTORCH_CUDA_ALLOC_CONF": settings} if settings else {},
    )
    return json.loads(said.splitlines()[-1])


@pytest.mark.parametrize(("name", "label"), CASES)
def test_pytorchs_cuda_code_allocates_what_was_promised(name: str, label: str) -> None:
    if not can_run(label):
        pytest.skip("peft is not installed")
    setup = setup_of(RUNS[name]())
    promised = setup if label == "none" else options_of(setup)[label].apply(setup)
    if label == EXPANDABLE:  # it is set before a process begins
        found = on_the_bench(name, "none", settings="expandable_segments:True")["none"]
    else:
        together = [each for each in LABELS[name] if each != EXPANDABLE and can_run(each)]
        found = on_the_bench(name, *together)[label]
    with promised.in_force():
        assert tuple(found) == peaks(promised)
