"""From the argument `gpu` of the public functions to a device."""

from __future__ import annotations

import contextlib
import functools
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from autobatch.devices.base import Device
from autobatch.devices.cuda.gpu import CudaGpu, describe
from autobatch.devices.cuda.runtime import CudaRuntime
from autobatch.devices.virtual.backend import built_for
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import NoGpuError, UsageError
from autobatch.gpus.catalogue import GpuSpec, find_gpu, is_device
from autobatch.support.wording import for_reader

__all__ = ["Gpu", "built", "choose_device", "described"]

_FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType, functools.partial)
Gpu = str | GpuSpec | torch.device | None


def choose_device(gpu: Gpu) -> Device:
    """Return the device that an argument `gpu` names: a card here, or one to simulate.

    Raises:
        UsageError: it names nothing; the subclass says how.
    """
    if is_device(gpu):
        return CudaGpu(CudaRuntime(_cuda_index(gpu)))
    return VirtualGpu(described(gpu))


def described(gpu: Gpu) -> GpuSpec:
    """Return the specification of the card to simulate, which may be one in this machine."""
    if isinstance(gpu, GpuSpec):
        return gpu
    if is_device(gpu):
        properties = torch.cuda.get_device_properties(_cuda_index(gpu))
        capability = properties.major, properties.minor
        return describe(properties.name, properties.total_memory, capability)
    if isinstance(gpu, str):
        return find_gpu(gpu)
    raise UsageError(
        f"gpu is {gpu!r}: use a name such as 'a100-40gb', a size, a GpuSpec, or a device such as "
        "'cuda:0'"
    )


def built(model: Any, gpu: Gpu) -> Any:
    """Return a model, which a function may build: that finds the card that `gpu` names.

    Code that asks `torch.cuda.is_available()` as it builds a model takes its path for CUDA then,
    also where the card is simulated.

    Raises:
        UsageError: `gpu` names nothing; the subclass says how.
    """
    if isinstance(model, nn.Module) or not isinstance(model, _FUNCTIONS):
        return model
    with contextlib.nullcontext() if is_device(gpu) else built_for(described(gpu)):
        return model()


def _cuda_index(gpu: Gpu) -> int:
    """Return the index of a CUDA device of this machine.

    Raises:
        NoGpuError: there is none, or none of that index.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise NoGpuError(
            "there is no CUDA GPU in this machine: name the one to simulate, such as "
            + for_reader('gpu="a100-40gb" or gpu="24GiB"', "--gpu a100-40gb or --gpu 24GiB")
            + " (`autobatch gpus` lists the known ones)"
        )
    index = None if gpu is None else torch.device(str(gpu)).index
    if index is not None and index >= count:
        raise NoGpuError(f"there is no {gpu} in this machine: it has {count}, from cuda:0 on")
    return torch.cuda.current_device() if index is None else index
