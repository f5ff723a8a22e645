"""Copies of the user's objects on a device, made without touching the originals.

Invariant: what was one object is one object among the copies, so that tied parameters stay tied.
No weight is read, moved or materialised, unless the function that makes memory does so.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autobatch.errors import WorkloadError

__all__ = ["Copier", "blank"]


def blank(original: Tensor, device: torch.device) -> Tensor:
    """Make uninitialised memory of a tensor's layout on a device."""
    return torch.empty_strided(
        original.size(), original.stride(), dtype=original.dtype, device=device
    )


class Copier:
    """Makes deep copies, and remembers the counterpart of every original.

    The counterpart of a parameter or buffer is on the device. That of any other tensor is where the
    tensor was; one on `meta` counts as on the CPU, as the user never said where it would be.
    """

    def __init__(self, device: torch.device, make: Callable[[Tensor, torch.device], Tensor]):
        """Copy to `device`; `make` makes the memory of a tensor there, with its values or not."""
        self._device = device
        self._make = make
        self._memo: dict[int, Any] = {}
        self._originals: list[Any] = []  # keeps ids in the memo from being reused

    def model(self, model: nn.Module) -> nn.Module:
        """Copy a module, its parameters and buffers first, in the order of `Module.to`."""
        if id(model) in self._memo:
            return self._memo[id(model)]  # type: ignore[no-any-return]
        self._move_state(model)
        duplicate: nn.Module = self._deep(model)
        for module in duplicate.modules():  # compiled code belongs to the originals
            module._compiled_call_impl = None
            for name, child in module.named_children():
                if hasattr(child, "_orig_mod"):
                    setattr(module, name, child._orig_mod)
        return duplicate

    def any(self, value: Any) -> Any:
        """Copy a module, a function, or anything else that holds some.

        Raises:
            WorkloadError: something in it cannot be copied; the cause is chained.
        """
        if isinstance(value, nn.Module):
            return self.model(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, functools.partial):
            arguments = [self._held(argument) for argument in value.args]
            named = {name: self._held(argument) for name, argument in value.keywords.items()}
            return functools.partial(self.any(value.func), *arguments, **named)
        return self._deep(value)

    def _deep(self, value: Any) -> Any:
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
        """Copy an optimizer to the device, with its parameters and their state.

        Where a parameter's counterpart is sharded, state of the parameter's shape is sharded too.
        State of another shape cannot be: that parameter's state is left out, and the next step
        makes it anew.
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
        # `Optimizer.__getstate__` would drop attributes that a subclass adds; `step` is left out
        # because schedulers replace it by a function that holds the original
        attributes = {name: value for name, value in vars(given).items() if name != "step"}
        if lost:
            kept = {key: state for key, state in given.state.items() if key not in lost}
            attributes["state"] = defaultdict(dict, kept)
        duplicate: torch.optim.Optimizer = type(given).__new__(type(given))
        self._remember(given, duplicate)
        vars(duplicate).update(self.any(attributes))
        return duplicate

    def _moved(self, value: Tensor, parameter: Any) -> bool:
        """Move state that an optimizer keeps for a parameter; return whether that is possible."""
        shard = self._memo.get(id(parameter))
        if shard is None or not hasattr(shard, "placements"):
            self.move(value)
        elif value.shape != shard.shape:
            return False
        elif id(value) not in self._memo:
            self._remember(value, torch.empty_like(shard, dtype=value.dtype, requires_grad=False))
        return True

    def changed(self, duplicate: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """Apply `change` to a copied module, and return what it returns.

        Parameters that `change` puts in the place of others become the originals' counterparts.
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
        """Copy a function with the modules and tensors that its closure and its globals hold."""
        if (function.__module__ or "").partition(".")[0] == "torch":
            return function  # it holds nothing of the user's
        known: FunctionType | None = self._memo.get(id(function))
        if known is not None:
            return known
        cells = function.__closure__ or ()
        found = function.__globals__
        state = [
            name
            for name in _names(function.__code__)
            if isinstance(found.get(name), (nn.Module, Tensor))
        ]
        duplicate = FunctionType(
            function.__code__,
            dict(found) if state else found,
            function.__name__,
            function.__defaults__,
            tuple(CellType() for _ in cells),
        )
        duplicate.__kwdefaults__ = function.__kwdefaults__
        self._remember(function, duplicate)  # before its closure, which may hold the function
        for name in state:
            duplicate.__globals__[name] = self._held(found[name])
        for cell, copied in zip(cells, duplicate.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a cell that is not filled yet
                copied.cell_contents = self._held(cell.cell_contents)
        return duplicate

    def _held(self, value: Any) -> Any:
        """Copy what a function holds if it is a module, a tensor or a function; else keep it."""
        if isinstance(value, Tensor):
            return self.move(value) if value.dim() else value
        if isinstance(value, (nn.Module, FunctionType, functools.partial)):
            return self.any(value)
        return value

    def move(self, original: Tensor, device: torch.device | None = None) -> Tensor:
        """Return a tensor's counterpart; one that is made now is on the device, or on another."""
        known: Tensor | None = self._memo.get(id(original))
        if known is None:
            known = self._like(original, device or self._device)
            self._remember(original, known)
        return known

    def _like(self, original: Tensor, device: torch.device) -> Tensor:
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

    def _remember(self, original: Any, duplicate: Any) -> None:
        self._memo[id(original)] = duplicate
        self._originals.append(original)

    def _move_state(self, module: nn.Module) -> None:
        for child in module.children():
            self._move_state(child)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                self.move(tensor)


class _TensorCopies(TorchFunctionMode):
    """Lets `copy.deepcopy` take the copier's counterparts of tensors, and clone no memory."""

    def __init__(self, copier: Copier):
        super().__init__()
        self._copier = copier

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        original = args[0]
        place = original.device
        return self._copier.move(original, torch.device("cpu") if place.type == "meta" else place)


def _names(code: CodeType) -> set[str]:
    """Return the global names that a function's code, or code inside of it, may use."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names
