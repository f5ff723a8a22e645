"""Matrix products keep workspaces, as an H200 was measured to (reports.hardware.convolutions)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autobatch.devices.virtual.kernels import matrix_products
from tests.support.simulated import mlp, run

MIB = 2**20


def workspaces(model: nn.Module, gpu: str = "h200") -> list[int]:
    return [b.size_bytes for b in run(model, gpu=gpu).blocks if b.op.startswith("cublas")]


@pytest.fixture
def version(monkeypatch):
    def choose(number: str) -> None:
        monkeypatch.setattr(matrix_products.torch, "__version__", number)

    return choose


def test_a_product_with_a_bias_has_a_workspace_of_its_own_on_torch_2_11(version):
    version("2.11.0+cu130")
    assert workspaces(mlp()) == [32 * MIB, MIB, 32 * MIB]
    assert workspaces(nn.Sequential(nn.Linear(64, 64, bias=False))) == [32 * MIB] * 2


def test_newer_versions_share_one_workspace(version):
    version("2.12.0")
    assert workspaces(mlp()) == [32 * MIB] * 2


def test_the_environment_decides_before_the_version(version, monkeypatch):
    version("2.14.0")
    monkeypatch.setenv("TORCH_CUBLASLT_UNIFIED_WORKSPACE", "0")
    monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "2048")
    assert workspaces(mlp()) == [32 * MIB, 2 * MIB, 32 * MIB]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    assert workspaces(mlp(), "a100-40gb")[0] == 8519680


def test_the_workspace_is_taken_after_the_first_output():
    trace = run(mlp(), gpu="h200")
    first = next(i for i, b in enumerate(trace.blocks) if b.op == "cublas workspace")
    assert trace.blocks[first - 1].op == "aten::addmm"


def test_a_matrix_without_dense_rows_or_columns_is_copied_after_the_output():
    trace = run(nn.Linear(64, 64, bias=False), gpu="a100-40gb")  # the gradient of a sum is expanded
    backward = [b for b in trace.blocks if b.phase == "backward"]
    product = next(i for i, b in enumerate(backward) if b.op == "aten::mm")
    assert backward[product + 1].op == "contiguous"
    assert matrix_products.copied_operands([torch.empty(4, 6, device="meta").t()]) == []
