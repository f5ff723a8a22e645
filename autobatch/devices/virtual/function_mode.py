"""Calls of PyTorch's Python functions, in user code, that a simulated GPU answers in its own way.

Literal "cuda" devices land on the virtual device, tensors there say that they are on `cuda:0`, and
reads of their values give known values or placeholders.

Invariant: no call of the user's code is answered with the name of the virtual device.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autobatch.devices.one_card import require_card
from autobatch.devices.virtual.cuda_types import LEGACY_TYPES, CudaGenerator
from autobatch.devices.virtual.elements import (
    forget_values,
    is_certain,
    known_number,
    placeholder_of,
    values_of,
    was_upper_bound,
)
from autobatch.devices.virtual.fake_mode import VirtualMode
from autobatch.devices.virtual.guesses import Guesses
from autobatch.support.patching import patched
from autobatch.support.torch_private import (
    FakeTensor,
    no_dispatch,
    run_backward,
    tree_leaves,
    tree_map,
)

__all__ = ["CudaCalls"]

_plain_array: Any = Tensor.__array__
_Device = torch.device  # a name of this module is looked up faster
_TO: Any = Tensor.to
_CUDA = torch.device("cuda", 0)
_META = torch.device("meta")
_CHECKPOINT = "torch.utils.checkpoint"
_MOST_ELEMENTS = 2**24
"""Elements of an array for NumPy: it takes real memory, and what reads it takes time."""


class CudaCalls(TorchFunctionMode):
    """Routes calls while a workload is simulated.

    Attributes:
        arrays: how many times NumPy read values that are not known.
        asked: whether code outside of PyTorch asked a tensor if it is on CUDA.
    """

    def __init__(self, device: torch.device, guesses: Guesses | None = None):
        """Route to `device`; `guesses` notices what code decides by values that it reads."""
        super().__init__()
        self._device = device
        self._guesses = guesses or Guesses()
        self._index = device.index or 0
        self.arrays = 0
        self.asked = False
        self._depth = 0  # functions of PyTorch's own that run
        attention = F.scaled_dot_product_attention
        self._routes: dict[Any, Callable[..., Any]] = {
            # a module that imported it by name has the original
            attention: lambda *args, **kwargs: F.scaled_dot_product_attention(*args, **kwargs),
            Tensor.__deepcopy__: _deepcopy,
            Tensor.__format__: _format,
            Tensor.numpy: self._numpy,
            Tensor.__array__: self._array,
            Tensor.item: self._item,
            Tensor.__setitem__: self._setitem,
            Tensor.__bool__: lambda tensor: bool(_first(tensor)),
            Tensor.__int__: lambda tensor: int(_first(tensor)),
            Tensor.__float__: lambda tensor: float(_first(tensor)),
            Tensor.__index__: lambda tensor: operator.index(_first(tensor)),
            Tensor.tolist: _tolist,
            torch.tensor: partial(self._of_numbers, torch.tensor),
            torch.as_tensor: partial(self._of_numbers, torch.as_tensor),
            Tensor.cuda: self._cuda,
            # its words are no devices yet: "cuda" may be followed by an index
            torch.device: lambda *args, **kwargs: self._shown(torch.device(*args, **kwargs)),
            Tensor.type: self._type,
            Tensor.data_ptr: _data_ptr,
            Tensor.pin_memory: lambda tensor, *args, **kwargs: tensor,
        }
        if device.type != "cuda":
            is_cuda: Any = Tensor.is_cuda
            self._routes[is_cuda.__get__] = self._is_virtual
            place: Any = Tensor.device  # asked of tensors that consist of others
            self._routes[place.__get__] = lambda tensor: self._shown(tensor.device)

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
        for arg in args:  # fast, because there are a great many calls and few name a device
            kind = type(arg)
            if kind is str or kind is _Device:
                args = [self._landed(arg) for arg in args]
                break
        if kwargs:
            kwargs = {name: self._landed(value) for name, value in kwargs.items()}
            if type(kwargs.get("generator")) is CudaGenerator:
                del kwargs["generator"]  # there is no noise to draw
            require_card(kwargs.get("device"), self._index)  # may be an index, too
        if func is _TO and len(args) > 1:
            require_card(args[1], self._index)
        if type(func) is FunctionType:
            return self._in_python(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)

    def _in_python(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run a function of PyTorch's that is written in Python: its calls are not routed."""
        self._depth += 1
        try:
            return func(*args, **kwargs)
        finally:
            self._depth -= 1

    def _setitem(self, tensor: Tensor, key: Any, value: Any) -> None:
        """Write a number from the CPU, as PyTorch does for CUDA's tensors alone."""
        if type(value) in (int, float, bool) and tensor.device.type != "cpu":
            value = torch.scalar_tensor(value, dtype=tensor.dtype, device="cpu")
        tensor[key] = value

    def _item(self, tensor: Tensor) -> Any:
        if type(tensor) is FakeTensor and (known := known_number(tensor)) is not None:
            return known  # counters of optimizers are asked twice for each parameter
        value = _first(tensor).item()
        if type(value) is not float or not isinstance(tensor, FakeTensor):
            return value
        is_sure = values_of(tensor) is not None or is_certain(tensor)
        return value if is_sure else self._guesses.float_read(value)

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
            if value.type != "cuda":
                return value
        elif kind is not str or not value.startswith("cuda"):
            return value
        require_card(value, self._index)
        return self._device

    def _numpy(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tensor, FakeTensor):
            return Tensor.numpy(tensor, *args, **kwargs)
        if tensor.requires_grad and not kwargs.get("force") and not (args and args[0]):
            raise RuntimeError(
                "Can't call numpy() on Tensor that requires grad. "
                "Use tensor.detach().numpy() instead."
            )
        if tensor.fake_device.type != "cpu" and not kwargs.get("force") and not (args and args[0]):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
                "tensor to host memory first."
            )
        import numpy

        known = values_of(tensor)
        if known is not None:
            with no_dispatch():
                return known.detach().clone().numpy()
        if tensor.numel() > _MOST_ELEMENTS:
            raise MemoryError(f"an array of {tensor.numel():,} elements for NumPy")
        self.arrays += 1
        with no_dispatch():
            kind = (
                torch.empty((), dtype=tensor.dtype, device="cpu").numpy().dtype
            )  # none of bfloat16
        return numpy.full(tuple(tensor.shape), placeholder_of(tensor), dtype=kind)

    def _array(self, tensor: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Answer NumPy's own protocol, by which `numpy.asarray` and SciPy read tensors."""
        if not isinstance(tensor, FakeTensor):
            return _plain_array(tensor, *(() if dtype is None else (dtype,)))
        made = self._numpy(tensor)
        return made if dtype is None else made.astype(dtype, copy=False)

    def _is_virtual(self, tensor: Tensor) -> bool:
        module = sys._getframe(2).f_globals.get("__name__") or ""
        self.asked = self.asked or not module.startswith("torch.")
        return self._shown(tensor.device) == _CUDA

    def _shown(self, device: torch.device) -> torch.device:
        return _CUDA if device.type == self._device.type != "cuda" else device

    def _type(self, tensor: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Name a tensor's legacy type, or convert to one, as `torch.cuda.FloatTensor`."""
        if isinstance(dtype, (str, type)):
            name = dtype if isinstance(dtype, str) else f"{dtype.__module__}.{dtype.__name__}"
            place, _, kind = name.removeprefix("torch.").rpartition(".")
            if kind in LEGACY_TYPES:
                return tensor.to(self._device if place == "cuda" else "cpu", LEGACY_TYPES[kind])
        made = tensor.type(*(() if dtype is None else (dtype,)), *args, **kwargs)
        return made.replace(f".{self._device.type}.", ".cuda.") if isinstance(made, str) else made

    def _cuda(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        place = kwargs.pop("device", args[0] if args else None)
        require_card(place, self._index)
        return tensor.to(self._device, **kwargs)

    @contextlib.contextmanager
    def shown_as_cuda(self, mode: VirtualMode) -> Iterator[None]:
        """Let tensors on the virtual device say that they are on `cuda:0`, but for ops in `mode`.

        A fake tensor tells its device without asking a function mode.
        """

        def record_stream(tensor: Any, stream: Any) -> None:
            """Do nothing: there is one stream. PyTorch's own takes no stand-in for one."""

        if self._device.type == "cuda":
            with patched(FakeTensor, record_stream=record_stream):
                yield
            return

        def device(tensor: Any) -> torch.device:
            if tensor.fake_mode.in_kernel_invocation:
                return _META
            place: torch.device = tensor.fake_device
            if mode.is_inside:
                return place
            # checkpointing compares what it saved, there or elsewhere, with what it computed again
            is_pytorchs = self._depth and sys._getframe(1).f_globals.get("__name__") != _CHECKPOINT
            return place if is_pytorchs else self._shown(place)

        make: Any = Tensor._make_wrapper_subclass

        def composed(*args: Any, **kwargs: Any) -> Any:
            """Put a tensor that consists of others where they are, whatever they say."""
            return make(*args, **{name: self._landed(value) for name, value in kwargs.items()})

        with (
            patched(FakeTensor, device=property(device), record_stream=record_stream),
            patched(Tensor, _make_wrapper_subclass=staticmethod(composed)),
        ):
            yield

    @contextlib.contextmanager
    def in_backward(self) -> Iterator[None]:
        """Route calls inside backward passes too, where checkpointing runs forward passes again.

        PyTorch leaves a function mode while `Tensor.backward` runs, which the mode could override;
        so this one is entered again at the last step before the engine.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            depth, self._depth = self._depth, 0
            try:
                with self:
                    return run_backward(*args, **kwargs)
            finally:
                self._depth = depth

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


def _data_ptr(tensor: Tensor) -> int:
    """Return a number that is another for each storage, as code takes it for a key."""
    if not isinstance(tensor, FakeTensor):
        return Tensor.data_ptr(tensor)
    if not tensor.numel():
        return 0
    start: int = tensor.untyped_storage()._cdata
    return start + int(tensor.storage_offset()) * tensor.element_size()


def _format(tensor: Tensor, spec: str) -> str:
    return format(tensor.item(), spec) if not tensor.dim() else object.__format__(tensor, spec)


def _first(tensor: Tensor) -> Tensor:
    """Return a tensor of one element: of one that has more at most, the first."""
    is_bound = isinstance(tensor, FakeTensor) and tensor.numel() > 1 and was_upper_bound(tensor)
    return tensor.flatten()[0] if is_bound else tensor


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
