"""Calls of user code that a simulated GPU answers in its own way.

Literal "cuda" devices land on the virtual device, tensors there say that they are on CUDA, and
attention and recurrent layers run as the target GPU would run them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from autobatch.devices import rnn
from autobatch.devices.attention import attend

__all__ = ["CudaCalls"]


class CudaCalls(TorchFunctionMode):
    """Route calls of PyTorch's Python functions while a workload is simulated."""

    def __init__(self, device: torch.device, capability: tuple[int, int]):
        super().__init__()
        self._device = device
        self._routes: dict[Any, Callable[..., Any]] = {
            F.scaled_dot_product_attention: self._attention
        }
        self._capability = capability
        for name in rnn.LAYERS:
            route = partial(self._layer, name)
            self._routes[getattr(torch, name)] = route
            self._routes[getattr(torch._VF, name)] = route
        self._routes[torch._VF._pack_padded_sequence] = self._pack
        self._routes[torch._VF._pad_packed_sequence] = self._pad
        if device.type != "cuda":
            self._routes[Tensor.cuda] = self._cuda
            self._routes[Tensor.is_cuda.__get__] = self._is_cuda  # type: ignore[attr-defined]

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
            args = [self._landed(arg) for arg in args]
            if kwargs:
                kwargs = {name: self._landed(value) for name, value in kwargs.items()}
        return func(*args, **kwargs) if kwargs else func(*args)

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

    def _is_cuda(self, tensor: Tensor) -> bool:
        return tensor.device == self._device

    def _is_ours(self, tensor: Any) -> bool:
        return isinstance(tensor, FakeTensor) and tensor.fake_device == self._device

    def _attention(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._is_ours(query):
            return attend(self._capability, query, *args, **kwargs)
        return F.scaled_dot_product_attention(query, *args, **kwargs)

    def _layer(self, name: str, *args: Any) -> Any:
        if self._is_ours(args[0]):
            return rnn.run_layer(name, *args)
        return getattr(torch._VF, name)(*args)

    def _pack(self, data: Tensor, lengths: Tensor, batch_first: bool) -> Any:
        if not self._is_ours(data):
            return torch._VF._pack_padded_sequence(data, lengths, batch_first)
        return rnn.pack(data, batch_first)

    def _pad(self, data: Tensor, sizes: Tensor, batch_first: bool, *rest: Any) -> Any:
        if not self._is_ours(data):
            return torch._VF._pad_packed_sequence(data, sizes, batch_first, *rest)
        return rnn.pad(data, sizes, batch_first)
