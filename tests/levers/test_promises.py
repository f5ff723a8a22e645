"""The code that an option shows, applied by hand, takes the memory that the option promised."""

from __future__ import annotations

import os

import pytest
import torch

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.levers.setup import Setup
from tests.levers.setups import (
    RUNS,
    SAMPLES,
    by_hand,
    executed,
    options_of,
    peaks,
    setup_of,
)

CASES = [
    (name, label)
    for name in ("transformer", "convnet")
    for label in options_of(setup_of(RUNS[name]()))
]
LANGUAGE = (
    "precision: bf16 weights",
    "attention: sdpa",
    "loss: 8 chunks",
    "lora: rank 16, attention",
    "lora: rank 16, all linear",
    "checkpointing: every block",
    "checkpointing: every 2nd block",
    "checkpointing: selective",
    "checkpointing: selective, attention",
    "optimizer: in backward",
)

KEPT = {"precision: fp16 autocast": 2 * 512}
"""Blocks of a number each that the window here holds a little longer: the scaled loss."""


@pytest.fixture(autouse=True)
def _settings_kept(monkeypatch):
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(os, "environ", dict(os.environ))
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "label"), CASES)
def test_code_by_hand_takes_what_the_option_promised(name: str, label: str) -> None:
    option = options_of(setup_of(RUNS[name]()))[label]
    promised = option.apply(setup_of(RUNS[name]()))
    (allocated, reserved), hand = peaks(promised), peaks(by_hand(option, RUNS[name]))
    assert hand == (allocated - KEPT.get(label, 0), reserved)


@pytest.mark.slow
@pytest.mark.parametrize("label", LANGUAGE)
def test_code_by_hand_takes_what_was_promised_of_a_language_model(label: str) -> None:
    name = "eager llama" if label == "attention: sdpa" else "llama"
    options = options_of(setup_of(RUNS[name]()))
    if label.startswith("lora"):
        pytest.importorskip("peft")
    option = options[label]
    promised = option.apply(setup_of(RUNS[name]()))
    assert peaks(by_hand(option, RUNS[name])) == peaks(promised)


@pytest.mark.parametrize(
    ("value", "op"), [("memory-efficient", "efficient_attention"), ("cudnn", "cudnn_attention")]
)
def test_code_by_hand_runs_the_kernel_that_was_promised(value: str, op: str) -> None:
    setup = setup_of(RUNS["half llama"]())
    option = options_of(setup)[f"attention-kernel: {value}"]
    promised = option.apply(setup)

    def ops(setup: Setup) -> list[str]:
        run = VirtualGpu(setup.gpu).run(setup.workload, micro_batch=SAMPLES, accumulation_steps=2)
        return [block.op for block in run.trace.blocks]

    by_hand: list[str] = []
    executed(f"{option.code}\n    found.extend(ops(setup))", found=by_hand, ops=ops, setup=setup)
    with promised.in_force():
        assert by_hand == ops(promised)
    assert any(op in each for each in by_hand)
    assert not any(op in each for each in ops(setup))
