"""What a call of `tune` asks, in plain words, so that its plan can be found again."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from types import CellType, FunctionType
from typing import Any

import torch

from autobatch.devices.base import Device
from autobatch.devices.virtual.elements import KEPT_ELEMENTS
from autobatch.plan.plan import Plan
from autobatch.support.randomness import random_state_kept
from autobatch.support.units import GIB, MIB
from autobatch.tuning.probe import Probe
from autobatch.workload.sample import named_tensors
from autobatch.workload.workload import Workload

__all__ = ["holds", "question_of"]

_GREW_BYTES, _LEFT_BYTES = 64 * MIB, GIB

_FEW = 100
"""Entries of a container that is described."""


def question_of(probe: Probe, *, target: int, prove: bool) -> dict[str, object]:
    """Return what decides a plan: what is asked for, the GPU, and the workload.

    Of the workload that is the structure of the model, with the plain attributes and the
    configuration of its modules, the shapes of a batch, and names and options of the rest. What its
    functions do is in the source files that a cache compares; what they were told, in the arguments
    of the script.
    """
    device = probe.device
    gpu = replace(device.spec, sources={})
    if not device.is_simulated:  # its context grows with the kernels that it loads
        gpu = replace(gpu, context_bytes=0)
    return {
        "target": target,
        "headroom": probe.headroom,
        "prove": prove,
        "evidence": device.evidence,
        "gpu": gpu,
        "allowed_bytes": device.allowed_bytes,
        "model": _structure(probe.workload.model),
        "inputs": _shapes(probe.workload),
        "options": _options(probe.workload),
        "arguments": sys.orig_argv[1:],
    }


def holds(plan: Plan, device: Device) -> bool:
    """Say whether a card has about as much memory left as when a plan was made for it.

    Other processes may use at most 64 MiB more, and at most 1 GiB less.
    """
    grown = device.others_bytes - plan.others_bytes
    return -_LEFT_BYTES <= grown <= _GREW_BYTES


def _structure(model: torch.nn.Module) -> str:
    """Return a hash of a model's modules, parameters and buffers, without their values."""
    lines = []
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        lines.append(f"{name} {type(module)} {module.extra_repr()} {_plain(vars(module))} {config}")
    tensors = (*model.named_parameters(), *model.named_buffers())
    lines += [f"{name} {_layout(tensor)}" for name, tensor in tensors]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _shapes(workload: Workload) -> dict[str, str]:
    with random_state_kept():
        tensors = named_tensors(workload.batch(2))
    return {".".join(path): _layout(tensor) for path, tensor in tensors.items()}


def _layout(tensor: torch.Tensor) -> str:
    """Return a tensor's dtype and shape; of a few whole numbers, which may be sizes, the values."""
    layout = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}"
    if tensor.is_floating_point() or tensor.is_meta or tensor.numel() > KEPT_ELEMENTS:
        return layout
    return f"{layout} {tensor.tolist()}"


def _options(workload: Workload) -> dict[str, str]:
    names = (f.name for f in fields(workload) if f.name not in ("model", "batch", "notes"))
    return {name: _named(getattr(workload, name)) for name in names}


def _named(value: Any) -> str:
    """Return how an option is called, the same in every process."""
    if isinstance(value, functools.partial):
        return f"partial({_named(value.func)}, {value.args}, {value.keywords})"
    if isinstance(value, torch.optim.Optimizer):
        return f"{value!r} with state of {len(value.state)} parameters"
    if isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        held = _plain({name: _content(cell) for name, cell in cells})
        return f"{value.__module__}.{value.__qualname__} {held} {value.__defaults__}"
    if callable(value) and not isinstance(value, type):
        return f"{type(value)} {_plain(vars(value))} {getattr(value, 'cache_key', '')}"
    return repr(value)


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _plain(value: Any) -> Any:
    """Return what can be written down of a value: numbers, text, and small containers of those."""
    if isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, Mapping) and len(value) <= _FEW:
        named = {str(name): _plain(part) for name, part in value.items()}
        return {name: part for name, part in named.items() if part is not None}
    if isinstance(value, (list, tuple)) and len(value) <= _FEW:
        return [_plain(part) for part in value]
    return None
