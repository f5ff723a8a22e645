"""Options that say that they change no numbers leave a step of training what it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from autobatch.workload.loss import DefaultLoss
from tests.levers.setups import RUNS, SAMPLES, executed, options_of, setup_of

CASES = [
    (name, label)
    for name in ("transformer", "convnet")
    for label, option in options_of(setup_of(RUNS[name]())).items()
    if not option.changes_numerics
    # one changes no code, and torchao makes the other on a card alone
    and label not in ("allocator: expandable segments", "offload: optimizer state")
]
LANGUAGE = (
    "attention: sdpa",
    "loss: 8 chunks",
    "checkpointing: every block",
    "checkpointing: every 2nd block",
    "checkpointing: selective",
    "checkpointing: selective, attention",
)


def step(workload: Any, code: str) -> dict[str, torch.Tensor]:
    """Return gradients, parameters after a step, and buffers, in float64 on the CPU."""
    names: dict[str, Any] = {
        "model": copy.deepcopy(workload.model).double(),
        "batch": workload.batch(SAMPLES),
    }
    if isinstance(names["batch"], torch.Tensor):
        names["batch"] = names["batch"].double()
    names = executed(code, **names)
    model: nn.Module = names["model"].train()
    optimizer = names.get("optimizer") or torch.optim.AdamW(model.parameters())
    loss = workload.loss or DefaultLoss()
    value = loss(model, names["batch"])
    value.backward()
    state = {"loss": value.detach()}
    by_name = [
        (n.replace("_checkpoint_wrapped_module.", ""), p) for n, p in model.named_parameters()
    ]
    if "optimizers" not in names:
        state |= {f"gradient of {name}": p.grad for name, p in by_name}
        optimizer.step()
    state |= {name: p.detach() for name, p in by_name}
    for name, buffer in model.named_buffers():
        if "num_batches_tracked" not in name:  # counts how often it was run, and is not read
            state[name.replace("_checkpoint_wrapped_module.", "")] = buffer
    return state


def assert_same(
    changed: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], **tolerance: float
) -> None:
    assert changed.keys() <= plain.keys() and len(changed) > 3
    for name, value in changed.items():
        torch.testing.assert_close(
            value, plain[name], msg=lambda said, name=name: f"{name}: {said}", **tolerance
        )


@pytest.mark.parametrize(("name", "label"), CASES)
def test_a_step_is_the_same(name: str, label: str) -> None:
    workload = RUNS[name]()
    option = options_of(setup_of(workload))[label]
    assert_same(step(workload, option.code), step(workload, ""))


@pytest.mark.parametrize("label", LANGUAGE)
def test_a_step_of_a_language_model_is_the_same(label: str) -> None:
    workload = RUNS["eager llama" if label == "attention: sdpa" else "llama"]()
    option = options_of(setup_of(workload))[label]
    assert not option.changes_numerics
    changed, plain = step(workload, option.code), step(workload, "")
    # Adam's first step is the sign of a gradient, and Transformers rounds logits to float32
    for state in (changed, plain):
        for name in [name for name in state if not name.startswith(("gradient", "loss"))]:
            del state[name]
    assert_same(changed, plain, rtol=1e-5, atol=1e-8)


def test_the_comparison_sees_a_momentum_that_is_not_halved() -> None:
    workload = RUNS["convnet"]()
    option = options_of(setup_of(workload))["checkpointing: every block"]
    code = option.code.replace("layer.momentum = 1 -", "layer.momentum = 0 * 1 + layer.momentum #")
    assert code != option.code
    with pytest.raises(AssertionError, match="running_"):
        assert_same(step(workload, code), step(workload, ""))
