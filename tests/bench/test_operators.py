"""A simulated GPU allocates for single ops what PyTorch's CUDA code does."""

from __future__ import annotations

import functools

import pytest
import torch

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import find_gpu
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from tests.bench.children import answer, needs_bench
from tests.bench.operators import CASES, loss_of

pytestmark = needs_bench

GPU = "a100-40gb"
KEPT = ("cublas workspace", "cublaslt workspace", "cudnn workspace")
"""What libraries keep is there already on the bench, which knows no workspaces of cuDNN."""


@functools.cache
def on_the_bench() -> dict[str, list[int]]:
    return answer("operators", gpu=GPU)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_allocations_of_an_op_are_those_of_cuda(name: str) -> None:
    case = CASES[name]
    workload = Workload(
        model=case.build(), batch=batch_builder(torch.zeros(1, *case.shape)), loss=loss_of
    )
    trace = VirtualGpu(find_gpu(GPU)).run(workload, micro_batch=2, accumulation_steps=1).trace
    sizes = [
        block.size_bytes
        for block in trace.blocks
        if block.phase in ("forward", "backward") and block.size_bytes and block.op not in KEPT
    ]
    assert sizes == 2 * on_the_bench()[name]  # of two windows
