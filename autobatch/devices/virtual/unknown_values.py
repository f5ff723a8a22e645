"""Answers to reads of values that a tensor without memory does not have.

The rule users can rely on: every element of a tensor reads as one stand-in value. An unknown float
is 0.6, an unknown integer 1, an unknown truth value false; comparisons, logic and reductions of
stand-ins follow from them, so `isfinite` is true, `isnan` false and a count of NaNs 0. GradScaler's
overflow flag reads as "none found". Shapes that depend on values take their upper bound: every
element of a mask counts as chosen.

Small whole numbers that follow from the sample and the user's code have their values, and shapes
that depend on those alone are exact (`values.py`).

Invariant: no answer needs the value of any tensor on the device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from autobatch.devices.virtual.known_values import KnownValues, values_of
from autobatch.errors import WorkloadError

__all__ = ["UnknownValues", "placeholder_of"]

aten = torch.ops.aten

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "rsub": lambda first, second: second - first,
    "mul": operator.mul,
}
_NEGATIONS = {"logical_not", "bitwise_not"}
_FILLING: dict[str, Callable[[Sequence[Any]], Any]] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero_"), lambda args: 0),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), lambda args: 1),
    **dict.fromkeys(("full", "full_like", "fill_"), lambda args: placeholder_of(args[1])),
    "new_full": lambda args: placeholder_of(args[2]),
}
_KEEPING = frozenset(
    """
    _to_copy clone detach alias mean sum amax amin max min select slice view _unsafe_view reshape
    expand unsqueeze squeeze permute transpose t
    """.split()
)
_FLOAT = 0.6  # x, 1 - x and x - 0.5 are all positive: few thresholds are met exactly
_MOST_READS = 10_000
_MASKS = (torch.bool, torch.uint8)
_CONSTANTS = {"isnan": False, "isinf": False, "isposinf": False, "isneginf": False}


class UnknownValues:
    """Stand-in values and upper-bound shapes for one simulated run.

    Attributes:
        upper_bounds: names of the ops whose result took its upper bound.
        followed: names of the ops whose result took its shape from values that are known.
        shared_out: whether parts of unknown sizes were taken to be equal.
    """

    def __init__(self, kernels: Mapping[Any, Callable[..., Any]], values: KnownValues) -> None:
        """Start with further rules for ops whose results only the target GPU's kernels define."""
        self.upper_bounds: set[str] = set()
        self.followed: set[str] = set()
        self.shared_out = False
        self._values = values
        self._reads = 0
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
            aten.split_with_sizes.default: self._split,
            aten._amp_foreach_non_finite_check_and_unscale_.default: self._unscale,
            aten._amp_update_scale_.default: lambda mode, scale, *args: scale,
            aten.lift_fresh.default: values.lift,
            aten.embedding.default: self._embedding,
            aten._ctc_loss.default: self._ctc_loss,
            aten._ctc_loss.Tensor: self._ctc_loss,
            **kernels,
        }

    def __call__(self, mode: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Answer one op, or return NotImplemented where values do not matter."""
        rule = self._rules.get(func)
        if rule is not None:
            exact = self._exact(mode, func, args, kwargs)
            return rule(mode, *args, **kwargs) if exact is NotImplemented else exact
        name = func._opname
        if name.endswith("_") and name.startswith(("_foreach_", "_fused_")):
            return None  # in place: no memory, and nothing else to do for hundreds of tensors
        return NotImplemented

    def note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Remember the values of a result, or its stand-in where that follows from others."""
        self._values.follow(func, args, kwargs, output)
        if not isinstance(output, Tensor):
            return
        if args and output is args[0] and not _writes_nothing(func._opname, args):
            vars(output).pop("placeholder", None)  # it was something else
            vars(output.untyped_storage()).pop("chosen", None)
        if output.dtype.is_floating_point:  # only what is known of truths and integers goes on
            value = None if "alpha" in kwargs else _derived(func._opname, args)
        else:
            value = _result(func._opname, args, output.dtype)
        if value is not None:
            vars(output)["placeholder"] = value

    def given(self, fake: Tensor, real: Tensor) -> None:
        """Remember the values of a tensor of the sample where it is as small as sizes are."""
        self._values.give(fake, real)

    def _exact(self, mode: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Answer an op whose result's shape depends on values where they are known."""
        if torch.Tag.dynamic_output_shape not in func.tags:
            return NotImplemented
        made = self._values.result(func, args, kwargs)
        if made is NotImplemented:
            return NotImplemented
        self.followed.add(func._opname.lstrip("_").rstrip("2"))
        if isinstance(made, Tensor):
            return mode.empty(tuple(made.shape), made.dtype, args[0])
        return tuple(mode.empty(tuple(part.shape), part.dtype, args[0]) for part in made)

    def _read(self, mode: Any, tensor: Any) -> bool | int | float:
        known = values_of(tensor)
        if known is not None:
            return known.item()
        self._reads += tensor.dtype is torch.bool
        if self._reads > _MOST_READS:
            raise WorkloadError(
                f"the workload asked {_MOST_READS:,} times whether something holds on the GPU, "
                "which a simulation cannot know: a loop that ends by such a value never ends here"
            )
        value: bool | int | float = placeholder_of(tensor)
        return value

    def _unscale(self, mode: Any, grads: Any, found_inf: Any, inv_scale: Any) -> None:
        vars(found_inf)["placeholder"] = 0.0

    def _embedding(
        self,
        mode: Any,
        weight: Tensor,
        indices: Tensor,
        padding: int = -1,
        by_frequency: bool = False,
        sparse: bool = False,
    ) -> Any:
        if sparse:
            raise WorkloadError(
                "sparse gradients of an embedding cannot be simulated: build it with sparse=False"
            )
        return NotImplemented

    def _ctc_loss(
        self, mode: Any, log_probs: Tensor, targets: Tensor, *lengths: Any
    ) -> tuple[Any, Any]:
        steps, samples = log_probs.shape[:2]
        longest = targets.shape[1] if targets.dim() == 2 else targets.numel() // max(samples, 1)
        return (
            mode.empty((samples,), log_probs.dtype, log_probs),
            mode.empty((samples, steps, 2 * longest + 1), log_probs.dtype, log_probs),
        )

    def _chosen(self, mask: Tensor, name: str) -> int:
        """Return how many elements of a mask are true, at most."""
        known = values_of(mask)
        if known is not None:
            self.followed.add(name)
            return int(known.count_nonzero())
        layout, chosen = vars(mask.untyped_storage()).get("chosen", (None, 0))
        if layout == _layout(mask):
            return int(chosen)
        self.upper_bounds.add(name)
        return mask.numel()

    def _nonzero(self, mode: Any, tensor: Tensor) -> Any:
        return mode.empty((self._chosen(tensor, "nonzero"), tensor.dim()), torch.int64, tensor)

    def _masked_select(self, mode: Any, tensor: Tensor, mask: Tensor) -> Any:
        shape = torch.broadcast_shapes(tensor.shape, mask.shape)
        chosen = self._chosen(mask.expand(shape), "masked_select")
        return mode.empty((chosen,), tensor.dtype, tensor)

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
        self,
        mode: Any,
        tensor: Tensor,
        indices: Sequence[Tensor | None],
        values: Tensor,
        *rest: Any,
    ) -> Any:
        if not _has_mask(indices):
            return NotImplemented
        _count_by_rows(tensor, indices, values)
        return tensor

    def _copy_and_write(
        self,
        mode: Any,
        tensor: Tensor,
        indices: Sequence[Tensor | None],
        values: Tensor,
        *rest: Any,
    ) -> Any:
        if not _has_mask(indices):
            return NotImplemented
        _count_by_rows(tensor, indices, values)
        return mode.run(aten.clone.default, tensor)

    def _split(self, mode: Any, tensor: Tensor, sizes: Sequence[int], dim: int = 0) -> Any:
        """Part a tensor equally where the sizes are read from the GPU and unknown, as of experts.

        They all read as one then; real sizes add up to what there is.
        """
        total = tensor.shape[dim]
        if sum(sizes) == total or any(size != 1 for size in sizes):
            return NotImplemented
        self.shared_out = True
        size, rest = divmod(total, len(sizes))
        equal = [size + (part < rest) for part in range(len(sizes))]
        return mode.run(aten.split_with_sizes.default, tensor, equal, dim)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _count_by_rows(tensor: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> None:
    """Note that a mask chooses as many elements as there are rows to write: its gradient asks."""
    masks = [index for index in indices if index is not None]
    if len(masks) != 1 or indices[0] is None:
        return
    mask = masks[0]
    is_a_row_each = values.dim() == tensor.dim() - mask.dim() + 1 and values.shape[0] != 1
    if is_a_row_each and values.shape[0] <= mask.numel():
        vars(mask.untyped_storage())["chosen"] = _layout(mask), values.shape[0]


def _writes_nothing(name: str, args: Sequence[Any]) -> bool:
    """Whether an op writes where a mask is true that stands for false everywhere."""
    if name == "masked_fill_":
        return not placeholder_of(args[1])
    if name in ("index_put_", "_index_put_impl_"):
        masks = [i for i in args[1] if i is not None and i.dtype in _MASKS]
        return any(not placeholder_of(mask) for mask in masks)
    return False


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in _MASKS for index in indices)


def _derived(name: str, args: Sequence[Any]) -> float | None:
    """Return the stand-in of a float that copies, averages or chooses what has a known one."""
    if name in ("scalar_tensor", "full"):
        return _known_standin(args[-1])
    if name in _ARITHMETIC:
        first, second = map(_known_standin, args[:2])
        return None if first is None or second is None else _ARITHMETIC[name](first, second)
    if name == "where" and len(args) == 3:
        return _known_standin(args[1 if placeholder_of(args[0]) else 2])
    if name == "masked_fill":
        return _known_standin(args[2 if placeholder_of(args[1]) else 0])
    if name not in _KEEPING or not args or not isinstance(args[0], Tensor):
        return None
    return _known_standin(args[0])


def _known_standin(value: Any) -> float | None:
    known = vars(value).get("placeholder") if isinstance(value, Tensor) else value
    return None if known is None else float(known)


def _result(name: str, args: Sequence[Any], dtype: torch.dtype) -> bool | int | None:
    """Return the stand-in of an op's truth value or integer; None where nothing follows."""
    if dtype is torch.bool and name in _COMPARISONS:
        return _COMPARISONS[name](placeholder_of(args[0]), placeholder_of(args[1]))
    if dtype is torch.bool and name in _CONSTANTS:
        return _CONSTANTS[name]
    if name in _NEGATIONS and dtype is torch.bool:
        return not placeholder_of(args[0])
    if name in ("logical_or", "bitwise_or"):
        return bool(placeholder_of(args[0]) or placeholder_of(args[1]))
    if name in ("logical_and", "bitwise_and", "mul") and dtype is torch.bool:
        return bool(placeholder_of(args[0]) and placeholder_of(args[1]))
    if name in _FILLING:
        return cast("bool | int | None", _FILLING[name](args))
    if not args or not isinstance(args[0], Tensor) or args[0].dtype.is_floating_point:
        return None
    value = placeholder_of(args[0])  # a view, a copy or a reduction of equal elements
    return bool(value) if dtype is torch.bool else int(value)


def placeholder_of(value: Any) -> Any:
    """Return what every element of a tensor reads as; a plain number is itself."""
    if not isinstance(value, Tensor):
        return value
    known = vars(value).get("placeholder")
    if known is not None:
        return known
    if value.dtype is torch.bool:
        return False
    return _FLOAT if value.dtype.is_floating_point or value.dtype.is_complex else 1
