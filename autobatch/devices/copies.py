"""Copies of the user's objects on a simulated device, made without touching the originals.

Invariant: no weight is read, moved or materialised; parameters that are tied stay tied.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autobatch.errors import WorkloadError

__all__ = ["Copier", "eager"]


def eager(model: nn.Module) -> tuple[nn.Module, bool]:
    """Return the module below `torch.compile`, and whether any part of it was compiled."""
    original: Any = model
    while hasattr(original, "_orig_mod"):
        original = original._orig_mod
    compiled = original is not model or any(_is_compiled(m) for m in original.modules())
    return original, compiled


class Copier:
    """Deep copies that share one memory of what has become what.

    A parameter or buffer becomes a fake tensor on the device, any other tensor a fake tensor on
    the device it was on (`meta` counts as the CPU: the user never said where it would live).
    """

    def __init__(self, device: torch.device):
        """Copy to `device`."""
        self._device = device
        self._memo: dict[int, Any] = {}
        self._originals: list[Any] = []  # keeps ids in the memo from being reused

    def model(self, model: nn.Module) -> nn.Module:
        """Copy a module; its parameters and buffers move in the order `Module.to` moves them."""
        self._move_state(model)
        duplicate: nn.Module = self.any(model)
        for module in duplicate.modules():
            module._compiled_call_impl = None
            for name, child in module.named_children():
                if _is_compiled(child) and hasattr(child, "_orig_mod"):
                    setattr(module, name, child._orig_mod)
        return duplicate

    def any(self, value: Any) -> Any:
        """Copy anything: an optimizer, a loss, a module's attributes.

        Raises:
            WorkloadError: something in it cannot be copied; the cause is chained.
        """
        try:
            with _TensorCopies(self):
                return copy.deepcopy(value, self._memo)
        except Exception as error:
            raise WorkloadError(
                f"{type(value).__name__} cannot be copied for the simulation ({error}): "
                "remove what cannot be deep-copied from it, or build it in a function and pass "
                "a Workload"
            ) from error

    def remembered(self, original: Tensor) -> Tensor | None:
        """Return what a tensor has become, or None."""
        return self._memo.get(id(original))

    def move(self, original: Tensor) -> Tensor:
        """Return the tensor's counterpart on the device, making it on first sight."""
        known = self._memo.get(id(original))
        if known is None:
            known = self.fake(original, self._device)
            self._remember(original, known)
        return known

    def fake(self, original: Tensor, device: torch.device) -> Tensor:
        """Make a tensor of the same layout, kind and attributes on a device."""
        if nn.parameter.is_lazy(original):
            raise WorkloadError(
                "the model has lazy parameters without a shape: call it once on a real batch first"
            )
        data: Tensor = torch.empty_strided(
            original.size(), original.stride(), dtype=original.dtype, device=device
        )
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
    """Let deepcopy turn tensors into fakes instead of cloning their memory."""

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
            known = self._copier.fake(
                original, torch.device("cpu") if device.type == "meta" else device
            )
            self._copier._remember(original, known)
        return known


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
