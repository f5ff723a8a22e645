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
from torch import Tensor, nn

from autobatch.devices.base import Device
from autobatch.devices.copies import batch_of
from autobatch.devices.preserve import kernel_switches
from autobatch.devices.virtual.elements import KEPT_ELEMENTS
from autobatch.plan.plan import Plan
from autobatch.records.plan_record import Objective
from autobatch.support.units import GIB, MIB
from autobatch.tuning.probe import Probe
from autobatch.workload.identity import identity_of
from autobatch.workload.sample import Built
from autobatch.workload.tree import leaves
from autobatch.workload.workload import Workload

__all__ = ["holds", "question_of"]

_GREW_BYTES, _LEFT_BYTES = 64 * MIB, GIB

_PLAIN = (bool, int, float, str, type(None))
_FEW = 100
"""Entries of a container that is described."""

_OPTIONS = [f.name for f in fields(Workload) if f.name not in ("model", "batch", "notes")]


def question_of(
    probe: Probe,
    *,
    target: int,
    prove: bool,
    objective: Objective = "largest",
    with_values: bool = True,
) -> dict[str, object]:
    """Return what decides a plan: what is asked for, the GPU, and the workload.

    Of the workload that is the structure of the model, with the plain attributes and the
    configuration of its modules, the shapes of a batch, and names and options of the rest; and code
    of the user's own with what it reads, such as globals and attributes of classes. What its
    functions do is also in the source files that a cache compares; what they were told, in the
    arguments of the script.

    Of a few whole numbers in a batch or in the model's buffers, which may be sizes, the values
    count, unless `with_values` says no: what is asked in another process, or once more, has other
    labels where they are drawn at random.
    """
    device, workload = probe.device, probe.workload
    batch = batch_of(workload.batch, 2)
    gpu = replace(device.spec, sources={})
    if not device.is_simulated:  # its context grows with the kernels that it loads
        gpu = replace(gpu, context_bytes=0)
    return {
        "target": target,
        "headroom": probe.headroom,
        "prove": prove,
        "objective": objective,
        "evidence": device.evidence,
        "gpu": gpu,
        "allowed_bytes": device.allowed_bytes,
        "model": _structure(workload.model, with_values),
        "inputs": {
            ".".join(path): _layout(leaf, with_values)
            if isinstance(leaf, Tensor)
            else _described(leaf)
            for path, leaf in leaves(batch)
        },
        "options": {name: _described(getattr(workload, name)) for name in _OPTIONS},
        "code": _code_of(workload),
        "switches": kernel_switches(),
        "arguments": sys.orig_argv[1:],
    }


def holds(plan: Plan, device: Device) -> bool:
    """Say whether a card has about as much memory left as when a plan was made for it.

    Other processes may use at most 64 MiB more, and at most 1 GiB less.
    """
    grown = device.others_bytes - plan.others_bytes
    return -_LEFT_BYTES <= grown <= _GREW_BYTES


def _code_of(workload: Workload) -> str:
    """Return a hash of the user's own classes and functions, and of what these read."""
    parts = {name: getattr(workload, name) for name in ("model", *_OPTIONS)}
    if not isinstance(workload.batch, Built):  # which holds the sample
        parts["batch"] = workload.batch
    return hashlib.sha256(repr(sorted(identity_of(parts).items())).encode()).hexdigest()


def _structure(model: nn.Module, with_values: bool) -> str:
    """Return a hash of a model's modules, parameters and buffers; see `_layout` for values."""
    lines = []
    for name, module in model.named_modules():
        switches = {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN)}
        config = getattr(module, "config", None)
        lines.append(f"{name} {type(module)} {module.extra_repr()} {switches} {config}")
    tensors = (*model.named_parameters(), *model.named_buffers())
    lines += [f"{name} {_layout(tensor, with_values)}" for name, tensor in tensors]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _layout(tensor: Tensor, with_values: bool = True) -> str:
    """Return a tensor's dtype and shape; of a few whole numbers, which may be sizes, the values."""
    layout = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}"
    many = tensor.numel() > KEPT_ELEMENTS
    if not with_values or many or tensor.is_floating_point() or tensor.is_meta:
        return layout
    return f"{layout} {tensor.tolist()}"


def _described(value: Any, depth: int = 3) -> str:
    """Return what can be told of a value: numbers and text, what functions hold, options."""
    if isinstance(value, Tensor):
        return _layout(value)
    if isinstance(value, (*_PLAIN, type, torch.dtype)):
        return repr(value)
    if isinstance(value, torch.optim.Optimizer):
        return f"{value!r} with state of {len(value.state)} parameters"
    if isinstance(value, (list, tuple, Mapping)) and len(value) > _FEW:
        return f"{type(value)} of {len(value)}"
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    held = value if isinstance(value, Mapping) else _held(value)
    parts = {str(name): _described(part, depth - 1) for name, part in held.items() if depth}
    return f"{getattr(value, '__qualname__', type(value))} {parts}"


def _held(value: Any) -> dict[str, Any]:
    """Return what a function was made with, or what an object holds; of a module, nothing."""
    if isinstance(value, functools.partial):
        return {"function": value.func, "arguments": value.args, **value.keywords}
    if isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        held = {name: cell.cell_contents for name, cell in cells if cell != CellType()}  # not empty
        return {**held, "defaults": value.__defaults__}
    if is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    own = {"key": value.cache_key} if hasattr(value, "cache_key") else {}
    return own if isinstance(value, nn.Module) else {**own, **getattr(value, "__dict__", {})}
