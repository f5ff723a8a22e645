"""Copies of the user's objects on a device, made without touching the originals.

Invariant: parameters that are tied stay tied; unless told otherwise, no weight is read, moved or
materialised.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autobatch.errors import WorkloadError
from autobatch.support.torch_private import FakeTensor

__all__ = ["Copier", "apply_without_swapping", "blank"]


def blank(original: Tensor, device: torch.device) -> Tensor:
    """Make memory of a tensor's layout on a device, with nothing in it."""
    return torch.empty_strided(
        original.size(), original.stride(), dtype=original.dtype, device=device
    )


class Copier:
    """Deep copies that share one memory of what has become what.

    A parameter or buffer becomes a tensor on the device, any other tensor one on the device it
    was on (`meta` counts as the CPU: the user never said where it would live).
    """

    def __init__(
        self,
        device: torch.device,
        make: Callable[[Tensor, torch.device], Tensor] = blank,
    ):
        """Copy to `device`; `make` gives the memory of one copied tensor, with values or not."""
        self._device = device
        self._make = make
        self._memo: dict[int, Any] = {}
        self._originals: list[Any] = []  # keeps ids in the memo from being reused

    def model(self, model: nn.Module) -> nn.Module:
        """Copy a module; its parameters and buffers move in the order `Module.to` moves them."""
        if id(model) in self._memo:
            return self._memo[id(model)]  # type: ignore[no-any-return]
        self._move_state(model)
        duplicate: nn.Module = self.any(model)
        for module in duplicate.modules():
            module._compiled_call_impl = None
            for name, child in module.named_children():
                if hasattr(child, "_orig_mod"):
                    setattr(module, name, child._orig_mod)
        return duplicate

    def any(self, value: Any) -> Any:
        """Copy anything: an optimizer, a loss, a module's attributes.

        Raises:
            WorkloadError: something in it cannot be copied; the cause is chained.
        """
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            arguments = [self._held(argument) for argument in value.args]
            named = {name: self._held(argument) for name, argument in value.keywords.items()}
            return functools.partial(self.any(value.func), *arguments, **named)
        try:
            with _TensorCopies(self):
                return copy.deepcopy(value, self._memo)
        except Exception as error:
            raise WorkloadError(
                f"{type(value).__name__} cannot be copied for the probe ({error}): "
                "remove what cannot be deep-copied from it, or build it in a function and pass "
                "a Workload"
            ) from error

    def optimizer(self, given: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Copy an optimizer with its state; its parameters and their state move to the device.

        State in the shape of a parameter that is sharded by now is sharded as it is; where a
        parameter has state in another shape, all of that is left for the next step to make anew.
        """
        for group in given.param_groups:
            for parameter in group["params"]:
                self.move(parameter)
        lost = set()
        for parameter, state in given.state.items():
            for value in state.values() if isinstance(state, dict) else ():
                # step counters stay on the CPU
                if isinstance(value, Tensor) and value.dim() and not self._moved(value, parameter):
                    lost.add(parameter)
        # deep-copying the optimizer itself would drop attributes that its class adds; a scheduler
        # replaces `step` by a function that holds the original
        attributes = {name: value for name, value in vars(given).items() if name != "step"}
        if lost:
            kept = {key: state for key, state in given.state.items() if key not in lost}
            attributes["state"] = defaultdict(dict, kept)
        duplicate: torch.optim.Optimizer = type(given).__new__(type(given))
        self._remember(given, duplicate)
        vars(duplicate).update(self.any(attributes))
        return duplicate

    def _moved(self, value: Tensor, parameter: Any) -> bool:
        """Move what an optimizer keeps for a parameter; return whether it could be done."""
        shard = self.remembered(parameter) if isinstance(parameter, Tensor) else None
        if shard is None or not hasattr(shard, "placements"):
            self.move(value)
        elif value.shape != shard.shape:
            return False
        elif id(value) not in self._memo:
            self._remember(value, torch.empty_like(shard, dtype=value.dtype, requires_grad=False))
        return True

    def changed(self, duplicate: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """Let `change` have its way with a copied module, and return what it makes of it.

        Parameters that take the place of others are from then on what the originals have become.
        """
        places = [
            (module._parameters, name, parameter)
            for module in duplicate.modules()
            for name, parameter in module._parameters.items()
        ]
        result = change(duplicate)
        new = {id(old): now[name] for now, name, old in places if now.get(name) is not old}
        for key, known in self._memo.items():
            if id(known) in new:
                self._memo[key] = new[id(known)]
        return result

    def _function(self, function: FunctionType) -> FunctionType:
        """Copy a function with the modules and tensors in its closure and among its globals."""
        if (function.__module__ or "").partition(".")[0] == "torch":
            return function  # it holds nothing of the user's
        known: FunctionType | None = self._memo.get(id(function))
        if known is not None:
            return known
        cells = function.__closure__ or ()
        state = {
            name: function.__globals__[name]
            for name in _names(function.__code__)
            if isinstance(function.__globals__.get(name), (nn.Module, Tensor))
        }
        duplicate = FunctionType(
            function.__code__,
            {**function.__globals__, **state} if state else function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(CellType() for _ in cells),
        )
        duplicate.__kwdefaults__ = function.__kwdefaults__
        self._remember(function, duplicate)  # before its closure, which may hold the function
        for name, held in state.items():
            duplicate.__globals__[name] = self._held(held)
        for cell, copied in zip(cells, duplicate.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a cell that is not filled yet
                copied.cell_contents = self._held(cell.cell_contents)
        return duplicate

    def _held(self, value: Any) -> Any:
        """Copy what a function holds if it is a module, a tensor or a function; else keep it."""
        if isinstance(value, nn.Module):
            return self.model(value)
        if isinstance(value, Tensor):
            return self.move(value) if value.dim() else value
        if isinstance(value, (FunctionType, functools.partial)):
            return self.any(value)
        return value

    def remembered(self, original: Tensor) -> Tensor | None:
        """Return what a tensor has become, or None."""
        return self._memo.get(id(original))

    def move(self, original: Tensor) -> Tensor:
        """Return the tensor's counterpart on the device, making it on first sight."""
        known = self._memo.get(id(original))
        if known is None:
            known = self.like(original, self._device)
            self._remember(original, known)
        return known

    def like(self, original: Tensor, device: torch.device) -> Tensor:
        """Make a tensor of the same layout, kind and attributes on a device."""
        if nn.parameter.is_lazy(original):
            raise WorkloadError(
                "the model has lazy parameters without a shape: call it once on a real batch first"
            )
        data = self._make(original, device)
        if isinstance(original, nn.Parameter):
            data = nn.Parameter(data, requires_grad=original.requires_grad)
        elif original.is_leaf and original.requires_grad:
            data.requires_grad_()
        attributes = {k: v for k, v in original.__dict__.items() if not isinstance(v, Tensor)}
        data.__dict__.update({k: v for k, v in attributes.items() if k not in data.__dict__})
        return data

    def _remember(self, original: Any, known: Any) -> None:
        self._memo[id(original)] = known
        self._originals.append(original)

    def _move_state(self, module: nn.Module) -> None:
        for child in module.children():
            self._move_state(child)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                self.move(tensor)


class _TensorCopies(TorchFunctionMode):
    """Let deepcopy turn tensors into the copier's instead of cloning their memory."""

    def __init__(self, copier: Copier):
        super().__init__()
        self._copier = copier

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        original = args[0]
        known = self._copier.remembered(original)
        if known is None:
            device = original.device
            known = self._copier.like(
                original, torch.device("cpu") if device.type == "meta" else device
            )
            self._copier._remember(original, known)
        return known


def _names(code: CodeType) -> set[str]:
    """Return the global names that a function's code, or code inside of it, may use."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def apply_without_swapping(
    module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """Do what `Module._apply` does to modules of fake tensors; leave real ones where they are.

    A real module that user code moves to the GPU stays put: its tensors are moved when used.
    """
    if recurse:
        for child in module.children():
            child._apply(change)
    with torch.no_grad():
        for name, parameter in _fakes(module._parameters):
            changed = change(parameter)
            if changed is not parameter:
                module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
        for name, buffer in _fakes(module._buffers):
            module._buffers[name] = change(buffer)
    return module


def _fakes(tensors: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in tensors.items() if isinstance(tensor, FakeTensor)]
