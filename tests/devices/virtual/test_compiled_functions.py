"""Compiled updates of 8-bit states allocate nothing; all other functions are recorded op by op."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import autobatch
from autobatch.devices.virtual.compiled_functions import compiled_functions_fused
from autobatch.devices.virtual.recorder import StorageRecorder
from autobatch.support.units import MIB

WIDTH = 1024


class OptimState8bit:
    """A state of the name that torchao gives its own."""


class OptimState4bit:
    """Another one."""


class Listening(StorageRecorder):
    """Counts the functions that it is told of."""

    told = 0

    def in_registers(self, since: tuple[int, int], kept: Any) -> None:
        self.told += 1


def double(value: Any, state: Any = None) -> Any:
    return 2 * value


def told(state: Any, *, with_gradients: bool = False, **options: Any) -> int:
    recorder = Listening()
    with (
        torch.compiler.set_stance("force_eager"),
        compiled_functions_fused(recorder),
        torch.set_grad_enabled(with_gradients),
    ):
        assert torch.compile(double, **options)(2, state) == 4
        assert torch.compile(**options)(double)(3, state) == 6
    return recorder.told


def test_a_compiled_update_of_an_8_bit_state_is_told_to_the_recorder():
    assert told(OptimState8bit(), fullgraph=True) == 2


def test_other_functions_are_not():
    assert told(OptimState4bit()) == 0
    assert told(None) == 0


def test_a_function_that_needs_gradients_is_not():
    assert told(OptimState8bit(), with_gradients=True) == 0


def test_a_compiled_module_stays_one():
    before = torch.compile
    with compiled_functions_fused(Listening()):
        assert isinstance(torch.compile(nn.Linear(2, 2)), nn.Module)
    assert torch.compile is before


def test_what_is_made_and_freed_inside_has_no_memory_except_of_products():
    recorder = StorageRecorder()
    outside = torch.empty(1)
    recorder.created(outside, "aten::empty")
    before = recorder.extent()
    between, product, result = (torch.empty(size) for size in (10, 20, 30))
    recorder.created(between, "aten::lerp.Scalar")
    recorder.created(product, "aten::mm")
    recorder.created(result, "aten::add.Tensor")
    del between, product
    recorder.in_registers(before, re.compile(r"mm\b"))
    assert recorder.trace(1, 1).sizes == (4, 0, 80, 120)
    del result


def test_torchaos_8_bit_optimizer_holds_states_and_nothing_else():
    optim = pytest.importorskip("torchao.optim")
    found = autobatch.predict(
        nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16),
        micro_batch=1,
        sample=torch.zeros(2, WIDTH, dtype=torch.bfloat16),
        loss=lambda model, batch: model(batch).float().mean(),
        optimizer=lambda parameters: optim.AdamW8bit(parameters, lr=1e-3),
        gpu="a100-40gb",
    )
    held = found.parameters_bytes + found.gradients_bytes + found.optimizer_bytes
    assert found.optimizer_bytes < 1.1 * 2 * WIDTH**2
    assert found.peak_allocated_bytes - held - found.workspace_bytes < MIB
