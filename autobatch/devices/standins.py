"""Answers to reads of values that a tensor without memory does not have.

The rule users can rely on: an unknown float reads as 0.5 (neither x nor 1 - x is zero), an
unknown integer as 1, and a truth value as what the comparison gives for those (so `isfinite` is
true, `isnan` false); a truth value of unknown origin is false. GradScaler's overflow flag reads as "none found".
Shapes that depend on values take their upper bound: every element of a mask counts as chosen.

Invariant: no answer needs the value of any tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["StandIns"]

aten = torch.ops.aten

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_NEGATIONS = {"logical_not", "bitwise_not"}
_MASKS = (torch.bool, torch.uint8)
_CONSTANTS = {"isnan": False, "isinf": False, "isposinf": False, "isneginf": False}


class StandIns:
    """Stand-in values and upper-bound shapes for one simulated run.

    Attributes:
        upper_bounds: names of the ops whose result took its upper bound.
        reads: how many values were read from the device.
    """

    def __init__(self, kernels: Mapping[Any, Callable[..., Any]]) -> None:
        """Start with further rules for ops whose results only the target GPU's kernels define."""
        self.upper_bounds: set[str] = set()
        self.reads = 0
        self._rules: dict[Any, Callable[..., Any]] = {
            aten._local_scalar_dense.default: self._read,
            aten.equal.default: lambda mode, *args: True,
            aten.allclose.default: lambda mode, *args, **kwargs: True,
            aten.nonzero.default: self._nonzero,
            aten.masked_select.default: self._masked_select,
            aten._unique2.default: self._unique2,
            aten.unique_dim.default: self._unique_dim,
            aten.unique_consecutive.default: self._unique_consecutive,
            aten.bincount.default: self._bincount,
            aten.repeat_interleave.Tensor: self._repeat_interleave,
            aten.index.Tensor: self._index,
            aten.index_put.default: self._copy_and_write,
            aten.index_put_.default: self._write,
            aten._index_put_impl_.default: self._write,
            aten._unsafe_index.Tensor: self._index,
            aten._amp_foreach_non_finite_check_and_unscale_.default: self._unscale,
            aten._amp_update_scale_.default: lambda mode, scale, *args: scale,
            **kernels,
        }

    def __call__(self, mode: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Answer one op, or return NotImplemented where values do not matter."""
        rule = self._rules.get(func)
        if rule is not None:
            return rule(mode, *args, **kwargs)
        name = func._opname
        if name.startswith("_foreach_") and name.endswith("_"):
            for tensor in args[0]:
                tensor.constant = None
            return None  # in place: no memory, and nothing else to do for hundreds of tensors
        return NotImplemented

    def note_truth(self, func: Any, args: Sequence[Any], output: Any) -> None:
        """Remember what a truth value would be if every number were its stand-in."""
        if not isinstance(output, Tensor):
            return
        name = func._opname
        known = vars(args[0]).get("known_value") if name == "select" else None
        if known is not None:
            vars(output)["known_value"] = known
        elif output.dtype is torch.bool:
            vars(output)["truth"] = _truth_of(name, args)

    def _read(self, mode: Any, tensor: Any) -> bool | int | float:
        constant = tensor.constant
        if constant is not None:
            return constant.item()  # type: ignore[no-any-return]
        self.reads += 1
        known = vars(tensor).get("known_value")
        if known is not None:
            return known  # type: ignore[no-any-return]
        if tensor.dtype is torch.bool:
            return _truth(tensor)
        return _number(tensor.dtype)

    def _unscale(self, mode: Any, grads: Any, found_inf: Any, inv_scale: Any) -> None:
        found_inf.known_value = 0.0

    def _nonzero(self, mode: Any, tensor: Tensor) -> Any:
        self.upper_bounds.add("nonzero")
        return mode.empty((tensor.numel(), tensor.dim()), torch.int64, tensor)

    def _masked_select(self, mode: Any, tensor: Tensor, mask: Tensor) -> Any:
        self.upper_bounds.add("masked_select")
        shape = torch.broadcast_shapes(tensor.shape, mask.shape)
        return mode.empty((shape.numel(),), tensor.dtype, tensor)

    def _unique2(
        self,
        mode: Any,
        tensor: Tensor,
        sorted: bool = True,
        inverse: bool = False,
        counts: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.upper_bounds.add("unique")
        size = tensor.numel()
        return (
            mode.empty((size,), tensor.dtype, tensor),
            mode.empty(tuple(tensor.shape) if inverse else (0,), torch.int64, tensor),
            mode.empty((size if counts else 0,), torch.int64, tensor),
        )

    def _unique_dim(
        self,
        mode: Any,
        tensor: Tensor,
        dim: int,
        sorted: bool = True,
        inverse: bool = False,
        counts: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.upper_bounds.add("unique")
        size = tensor.shape[dim]
        return (
            mode.empty(tuple(tensor.shape), tensor.dtype, tensor),
            mode.empty((size if inverse else 0,), torch.int64, tensor),
            mode.empty((size if counts else 0,), torch.int64, tensor),
        )

    def _unique_consecutive(
        self,
        mode: Any,
        tensor: Tensor,
        inverse: bool = False,
        counts: bool = False,
        dim: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if dim is not None:
            return self._unique_dim(mode, tensor, dim, True, inverse, counts)
        return self._unique2(mode, tensor, True, inverse, counts)

    def _bincount(
        self, mode: Any, tensor: Tensor, weights: Tensor | None = None, minlength: int = 0
    ) -> Any:
        self.upper_bounds.add("bincount")
        dtype = torch.int64 if weights is None else weights.dtype
        return mode.empty((max(minlength, tensor.numel()),), dtype, tensor)

    def _repeat_interleave(
        self, mode: Any, repeats: Tensor, *, output_size: int | None = None
    ) -> Any:
        if output_size is None:  # each repeat reads as one
            self.upper_bounds.add("repeat_interleave")
            output_size = repeats.numel()
        return mode.empty((output_size,), repeats.dtype, repeats)

    def _index(self, mode: Any, tensor: Tensor, indices: Sequence[Tensor | None]) -> Any:
        if not _has_mask(indices):
            return NotImplemented
        chosen: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in _MASKS:
                chosen.append(index)
            else:
                chosen.extend(mode.run(aten.unbind.int, self._nonzero(mode, index), 1))
        return mode.run(aten.index.Tensor, tensor, chosen)

    def _write(
        self, mode: Any, tensor: Tensor, indices: Sequence[Tensor | None], *rest: Any
    ) -> Any:
        return tensor if _has_mask(indices) else NotImplemented

    def _copy_and_write(
        self, mode: Any, tensor: Tensor, indices: Sequence[Tensor | None], *rest: Any
    ) -> Any:
        if not _has_mask(indices):
            return NotImplemented
        return mode.run(aten.clone.default, tensor)


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in _MASKS for index in indices)


def _truth_of(name: str, args: Sequence[Any]) -> bool:
    """Return what an op with a truth value as its result gives for the stand-ins."""
    if name in _COMPARISONS:
        return _COMPARISONS[name](_standin(args[0]), _standin(args[1]))
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    if name in _NEGATIONS:
        return not _truth(args[0])
    if name in ("logical_or", "bitwise_or"):
        return _truth(args[0]) or _truth(args[1])
    if name in ("logical_and", "bitwise_and", "mul"):
        return _truth(args[0]) and _truth(args[1])
    return bool(args) and isinstance(args[0], Tensor) and _truth(args[0])


def _truth(value: Any) -> bool:
    return bool(vars(value).get("truth")) if isinstance(value, Tensor) else bool(value)


def _standin(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _truth(value) if value.dtype is torch.bool else _number(value.dtype)


def _number(dtype: torch.dtype) -> int | float:
    return 1 if not (dtype.is_floating_point or dtype.is_complex) else 0.5
