"""Stand-ins for types of CUDA that code makes objects of: generators and legacy tensor types.

Each is put in the place of PyTorch's own for the length of a run, and is an instance or a class of
it as far as `isinstance` can tell.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["LEGACY_TYPES", "CudaGenerator", "legacy_types"]

_Generator = torch.Generator

LEGACY_TYPES: dict[str, torch.dtype] = {
    "FloatTensor": torch.float32,
    "DoubleTensor": torch.float64,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "LongTensor": torch.int64,
    "IntTensor": torch.int32,
    "ShortTensor": torch.int16,
    "CharTensor": torch.int8,
    "ByteTensor": torch.uint8,
    "BoolTensor": torch.bool,
}
"""Dtypes of PyTorch's legacy tensor types, by name."""


class _AnyGenerator(type(_Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, value: object) -> bool:
        return type.__instancecheck__(_Generator, value)


class CudaGenerator(_Generator, metaclass=_AnyGenerator):
    """A random generator that says that it is on the GPU, and whose numbers nobody draws."""

    _place: torch.device

    def __new__(cls, device: Any = "cpu") -> Any:
        """Make a generator; one on the CPU is PyTorch's own."""
        place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if place.type == "cpu":
            return _Generator()
        made = _Generator.__new__(cls)
        made._place = place
        return made

    def __init__(self, device: Any = "cpu"):
        """Do nothing: the generator is made."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it says that it is."""
        return torch.device("cuda", self._place.index or 0)


def legacy_types(device: torch.device) -> dict[str, type]:
    """Return stand-ins for `torch.cuda.FloatTensor` and its kind, whose tensors are on `device`."""
    return {name: _legacy_type(name, dtype, device) for name, dtype in LEGACY_TYPES.items()}


def _legacy_type(name: str, dtype: torch.dtype, device: torch.device) -> type:
    class Legacy(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, Tensor) and value.is_cuda and value.dtype is dtype

        def __call__(cls, *given: Any, **named: Any) -> Any:
            if len(given) == 1 and not isinstance(given[0], (int, torch.Size)):
                return torch.as_tensor(given[0], dtype=dtype, device=device)
            return torch.empty(*(given or (0,)), dtype=dtype, device=device)

    return Legacy(name, (), {"__module__": "torch.cuda", "dtype": dtype})
