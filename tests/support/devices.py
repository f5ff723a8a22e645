"""Every kind of device: simulated, CUDA played on the CPU, and the GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from autobatch.devices.base import Device
from autobatch.devices.cuda.gpu import CudaGpu
from autobatch.devices.cuda.runtime import CudaRuntime
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import GpuSpec
from autobatch.support.units import MIB
from tests.support.cuda_on_cpu import CudaOnCpu

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")

KINDS = ["simulated", "played", pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])]


def opened(kind: str, capacity_bytes: int = 256 * MIB) -> Device:
    """Return a device of a kind; the real one has the memory that it has."""
    if kind == "simulated":
        return VirtualGpu(GpuSpec(name="card", capacity_bytes=capacity_bytes))
    if kind == "played":
        return CudaGpu(CudaOnCpu(capacity_bytes))  # type: ignore[arg-type]
    return CudaGpu(CudaRuntime())
