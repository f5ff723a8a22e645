"""Calls of PyTorch's Python functions, in user code, that a simulated GPU answers in its own way.

Literal "cuda" devices land on the virtual device, tensors there say that they are on CUDA, and
reads of their values give known values or placeholders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autobatch.devices.virtual.elements import forget_values, placeholder_of, values_of
from autobatch.support.patching import patched
from autobatch.support.torch_private import (
    FakeTensor,
    no_dispatch,
    run_backward,
    tree_leaves,
    tree_map,
)

__all__ = ["CudaCalls"]

_NAMES = (str, torch.device)


class CudaCalls(TorchFunctionMode):
    """Routes calls while a workload is simulated."""

    def __init__(self, device: torch.device):
        """Route to `device`."""
        super().__init__()
        self._device = device
        attention = F.scaled_dot_product_attention
        self._routes: dict[Any, Callable[..., Any]] = {
            # a module that imported it by name has the original
            attention: lambda *args, **kwargs: F.scaled_dot_product_attention(*args, **kwargs),
            Tensor.__deepcopy__: _deepcopy,
            Tensor.__format__: _format,
            Tensor.numpy: _numpy,
            Tensor.tolist: _tolist,
            torch.tensor: partial(self._of_numbers, torch.tensor),
            torch.as_tensor: partial(self._of_numbers, torch.as_tensor),
            Tensor.pin_memory: lambda tensor, *args, **kwargs: tensor,
        }
        if device.type != "cuda":
            is_cuda: Any = Tensor.is_cuda
            self._routes[is_cuda.__get__] = lambda tensor: tensor.device == device
            self._routes[Tensor.cuda] = self._cuda
            self._routes[torch.device] = lambda *args, **kwargs: self._landed(
                torch.device(*args, **kwargs)
            )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a call, on the virtual device where it says "cuda"."""
        route = self._routes.get(func)
        if route is not None:
            return route(*args, **(kwargs or {}))
        if self._device.type != "cuda":
            for arg in args:  # fast, because there are a great many calls and few name a device
                if type(arg) in _NAMES:
                    args = [self._landed(arg) for arg in args]
                    break
            if kwargs:
                kwargs = {name: self._landed(value) for name, value in kwargs.items()}
        return func(*args, **kwargs) if kwargs else func(*args)

    def _of_numbers(self, make: Callable[..., Tensor], data: Any, *args: Any, **kwargs: Any) -> Any:
        """Make a tensor of a list, which may hold numbers that are on the GPU."""
        leaves = tree_leaves(data) if isinstance(data, (list, tuple)) else ()
        held = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        if held:
            data = tree_map(lambda leaf: _tolist(leaf) if isinstance(leaf, Tensor) else leaf, data)
        landed = {name: self._landed(value) for name, value in kwargs.items()}
        made = make(data, *map(self._landed, args), **landed)
        if any(values_of(leaf) is None for leaf in held):
            forget_values(made)
        return made

    def _landed(self, value: Any) -> Any:
        kind = type(value)
        if kind is torch.device:
            return self._device if value.type == "cuda" else value
        if kind is str and value.startswith("cuda"):
            return self._device
        return value

    def _cuda(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("device", None)
        return tensor.to(self._device, **kwargs)

    @contextlib.contextmanager
    def in_backward(self) -> Iterator[None]:
        """Route calls inside backward passes too, where checkpointing runs forward passes again.

        PyTorch leaves a function mode while `Tensor.backward` runs, which the mode could override;
        so this one is entered again at the last step before the engine.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return run_backward(*args, **kwargs)

        with patched(torch.autograd, _engine_run_backward=run):
            yield


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Any:
    if not isinstance(tensor, FakeTensor):
        return Tensor.__deepcopy__(tensor, memo)  # type: ignore[no-untyped-call]
    if id(tensor) not in memo:
        duplicate = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            duplicate = nn.Parameter(duplicate, tensor.requires_grad)
        memo[id(tensor)] = duplicate
    return memo[id(tensor)]


def _format(tensor: Tensor, spec: str) -> str:
    return format(tensor.item(), spec) if not tensor.dim() else object.__format__(tensor, spec)


def _numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(tensor, FakeTensor):
        return Tensor.numpy(tensor, *args, **kwargs)
    import numpy

    dtype = str(tensor.dtype).removeprefix("torch.")
    return numpy.array(_tolist(tensor), dtype=dtype).reshape(tuple(tensor.shape))


def _tolist(tensor: Tensor) -> Any:
    if not isinstance(tensor, FakeTensor):
        return Tensor.tolist(tensor)
    known = values_of(tensor)
    if known is not None:
        with no_dispatch():
            return known.tolist()
    return _filled(tuple(tensor.shape), placeholder_of(tensor))


def _filled(shape: tuple[int, ...], value: Any) -> Any:
    return [_filled(shape[1:], value) for _ in range(shape[0])] if shape else value
