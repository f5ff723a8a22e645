"""Launches of Triton kernels: skipped, as the memory they work on is made by Python before them.

A kernel allocates nothing, and what it would compute does not exist. Code that asks Triton for the
card (how many multiprocessors it has) is told of the simulated one. Autotuners are not run; a grid
that depends on their choice is not looked at.

Invariant: nothing of Triton is imported here; where the user's code did, its own names come back.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from autobatch.devices.virtual.elements import note_write
from autobatch.support.patching import patched

__all__ = ["triton_skipped"]

_KINDS = (
    ("triton.runtime.jit", "JITFunction"),
    ("triton.runtime.autotuner", "Autotuner"),
    ("triton.runtime.autotuner", "Heuristics"),
)


@contextlib.contextmanager
def triton_skipped(capability: tuple[int, int]) -> Iterator[None]:
    """Let launches of Triton kernels do nothing, on a card of a compute capability."""
    with contextlib.ExitStack() as patches:
        for module, name in _KINDS:
            kind = getattr(sys.modules.get(module), name, None)
            if hasattr(kind, "run"):
                patches.enter_context(patched(kind, run=_skip))
        config = getattr(sys.modules.get("triton.runtime.driver"), "driver", None)
        if config is not None and not torch.cuda.is_initialized() and hasattr(config, "_active"):
            patches.enter_context(patched(config, _active=_driver(capability)))
        yield


def _skip(kernel: Any, *args: Any, **kwargs: Any) -> None:
    """Do nothing but note that tensors may have been written to."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            note_write(value)


def _driver(capability: tuple[int, int]) -> Any:
    """Return what Triton asks for the card, which would need the driver's library."""
    target = SimpleNamespace(backend="cuda", arch=capability[0] * 10 + capability[1], warp_size=32)

    def properties(device: int = 0) -> dict[str, int]:
        card = torch.cuda.get_device_properties(device)
        return {
            "multiprocessor_count": card.multi_processor_count,
            "max_shared_mem": 98304 if capability[0] > 7 else 65536,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    return SimpleNamespace(
        get_current_device=lambda: 0,
        get_device_capability=lambda device=0: capability,
        get_current_target=lambda: target,
        get_current_stream=lambda device=0: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_device_interface=lambda: torch.cuda,
        set_current_device=lambda device: None,
        utils=SimpleNamespace(get_device_properties=properties),
    )
