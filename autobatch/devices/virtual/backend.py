"""A device type for simulated GPUs, and user code that says "cuda" landing on it.

Where the process has a live CUDA device, fake tensors on `cuda` need no backend and nothing is
registered. Elsewhere PyTorch's PrivateUse1 slot is claimed once, under the name `virtual_gpu`;
outside of a simulation it reports itself as unavailable.

Invariant: a process of the user's that has a real accelerator is never registered in (the
registration would make the virtual device its current accelerator, for ever).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from autobatch.devices.copies import apply_without_swapping
from autobatch.devices.virtual import autocast
from autobatch.devices.virtual.device_guard import VirtualDeviceGuard
from autobatch.devices.virtual.kernels import fused
from autobatch.devices.virtual.kernels.unknown_ops import run_on_cpu
from autobatch.errors import AutobatchError
from autobatch.gpus.catalogue import GpuSpec
from autobatch.support import process
from autobatch.support.patching import patched
from autobatch.support.torch_private import (
    FOREACH_MODULES,
    FakeTensor,
    PrivateUse1Hooks,
    fake_tensor,
    private_use_1_name,
    register_private_use_1,
)

__all__ = ["pretend", "virtual_device"]

_NAME = "virtual_gpu"
_active = False


class _Module:
    """What PyTorch looks up as `torch.virtual_gpu`."""

    _initialized = False

    def is_available(self) -> bool:
        return _active

    def is_initialized(self) -> bool:
        return False

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return int(_active)

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]


class _Inert:
    """Stands for streams, events and their contexts: one stream, and nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: None


class _Hooks(PrivateUse1Hooks):
    def is_available(self) -> bool:
        return _active

    def has_primary_context(self, device_index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


def virtual_device() -> torch.device:
    """Return the device that simulated tensors live on, registering it on first use.

    Raises:
        AutobatchError: another accelerator, or another PrivateUse1 backend, is live here.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    slot = private_use_1_name()
    if slot == _NAME:
        return torch.device(_NAME, 0)
    live = torch.accelerator.current_accelerator(check_available=True)
    if slot != "privateuseone" or (live is not None and not process.is_ours()):
        raise AutobatchError(
            f"this process has the accelerator {live or slot}, which a simulation would take the "
            "place of: use the command line, `autobatch probe your_file.py:function --gpu NAME`"
        )
    register_private_use_1(
        rename=_NAME,
        backend_module=_Module(),
        hook=_Hooks(),
        device_guard=VirtualDeviceGuard(),
    )
    autocast.register(_NAME)
    fused.register()
    return torch.device(_NAME, 0)


@contextlib.contextmanager
def pretend(spec: GpuSpec, device: torch.device) -> Iterator[None]:
    """Let PyTorch's own Python code, and the user's, take the virtual device for a CUDA GPU."""
    global _active
    with contextlib.ExitStack() as patches:
        # values that do not exist lie in no distribution's support
        patches.enter_context(patched(torch.distributions.Distribution, _validate_args=False))
        patches.enter_context(patched(nn.Module, _apply=apply_without_swapping))
        patches.enter_context(
            # values are followed in `values.py`
            patched(fake_tensor, CONSTANT_NUMEL_LIMIT=-1, run_fallback_kernel=run_on_cpu)
        )
        for module in FOREACH_MODULES:
            types = [*module._foreach_supported_types, FakeTensor]
            patches.enter_context(patched(module, _foreach_supported_types=types))
        if device.type == _NAME:
            patches.enter_context(patched(torch.cuda, **_answers(spec)))
            patches.enter_context(autocast.mirrored(_NAME))
            _active = True
        try:
            yield
        finally:
            _active = False


def _answers(spec: GpuSpec) -> dict[str, Callable[..., Any]]:
    """Return what functions of `torch.cuda` would answer on the simulated GPU."""
    major, minor = spec.compute_capability
    properties = SimpleNamespace(
        name=spec.name, major=major, minor=minor, total_memory=spec.capacity_bytes
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_name": lambda device=None: spec.name,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "current_stream": lambda device=None: _Inert(),
        "default_stream": lambda device=None: _Inert(),
        "Stream": _Inert,
        "Event": _Inert,
        "stream": _Inert,
        "device": _Inert,
        "memory_stats": lambda device=None: defaultdict(int),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (spec.capacity_bytes, spec.capacity_bytes),
    }
