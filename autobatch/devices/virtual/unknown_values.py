"""Answers to reads of values that a tensor without memory does not have.

The rule users can rely on: every element of a tensor reads as one value, its placeholder. An
unknown float is 0.6, an unknown whole number 1, an unknown truth value false; comparisons, logic
and reductions of placeholders follow from them, so `isfinite` is true, `isnan` false and a count of
NaNs 0. GradScaler's overflow flag reads as "none found". Shapes that depend on unknown values take
their upper bound: every element of a mask counts as true.

Small whole numbers that follow from the sample and the user's code have their values, and shapes
that depend on those alone are exact (`known_values.py`).

Invariant: no answer needs the value of any tensor on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.elements import (
    bounds_of,
    has_values,
    is_certain,
    is_plain,
    is_unbounded,
    mark_upper_bound,
    most_of,
    placeholder_of,
    set_bounds,
    set_certain,
    set_placeholder,
    set_true_count,
    true_count,
    values_of,
)
from autobatch.devices.virtual.guesses import Guesses
from autobatch.devices.virtual.known_values import KnownValues
from autobatch.devices.virtual.placeholders import MASKS, follow_placeholders
from autobatch.devices.virtual.varied import follow_varied, true_part
from autobatch.errors import WorkloadError
from autobatch.memory.rounding import rounded_up

__all__ = ["UnknownValues"]

aten = torch.ops.aten

_Rule = Callable[..., Any]
"""Answers an op: takes the mode, then the op's arguments; may return NotImplemented."""

_MOST_READS = 10_000
_MOST_READS_TRYING = 200
_INDEXED = (aten.index.Tensor, aten._unsafe_index.Tensor)

_WITH_INFO = frozenset(
    """
    linalg_cholesky_ex linalg_inv_ex linalg_lu_factor_ex linalg_ldl_factor_ex _linalg_solve_ex
    linalg_solve_ex
    """.split()
)
"""Factorizations; their last result, `info`, is 0 where they succeed."""

_COUNTS = frozenset(("sum", "count_nonzero"))


class UnknownValues:
    """Answers the ops of one run whose results follow from more than shapes and dtypes.

    Attributes:
        known: the values that are known; where they suffice, an answer is exact.
    """

    def __init__(
        self, known: KnownValues, rules: Mapping[Any, _Rule], guesses: Guesses | None = None
    ) -> None:
        """Start a run; `rules` adds ops whose results only the target GPU's kernels define."""
        self.known = known
        self._guesses = guesses or Guesses()
        self._upper_bounds: set[str] = set()
        self._exact_shapes: set[str] = set()
        self._split_equally = False
        self._parts: dict[Fraction, None] = {}
        self._reads = 0
        self._ruled: dict[int, tuple[bool, Any]] = {}  # by id, with the op that it is of
        self._rules: dict[Any, _Rule] = {
            aten._local_scalar_dense.default: self._read,
            aten.equal.default: self._equal,
            aten.allclose.default: lambda mode, *args, **kwargs: self._guesses.answer(True),
            aten.nonzero.default: self._nonzero,
            aten.masked_select.default: self._masked_select,
            aten._unique2.default: lambda mode, tensor, sorted=True, *returned: self._unique(
                mode, tensor, None, *returned
            ),
            aten.unique_dim.default: lambda mode, tensor, dim, sorted=True, *returned: self._unique(
                mode, tensor, dim, *returned
            ),
            aten.unique_consecutive.default: (
                lambda mode, tensor, inverse=False, counts=False, dim=None: self._unique(
                    mode, tensor, dim, inverse, counts
                )
            ),
            aten.bincount.default: self._bincount,
            aten.repeat_interleave.Tensor: self._repeat_interleave,
            aten.index.Tensor: self._index,
            aten._unsafe_index.Tensor: self._index,
            aten.index_put.default: partial(_index_put, copies=True),
            aten.index_put_.default: _index_put,
            aten._index_put_impl_.default: _index_put,
            aten.split_with_sizes.default: self._split,
            aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
            aten._amp_update_scale_.default: lambda mode, scale, *args: scale,
            aten.lift_fresh.default: known.lift,
            aten.embedding.default: _embedding,
            aten._embedding_bag.default: _embedding_bag,
            **rules,
        }

    @property
    def parts(self) -> tuple[Fraction, ...]:
        """The parts of elements that the counts of this run are, before they are rounded up."""
        return tuple(self._parts)

    def has_rule(self, func: Any) -> bool:
        """Whether `answer` may answer an op."""
        known = self._ruled.get(id(func))
        if known is None:
            has = func in self._rules or _is_nms(func) or _is_silent(func)
            known = self._ruled[id(func)] = has, func
        return known[0]

    def is_plain(self, func: Any, args: Sequence[Any]) -> bool:
        """Whether the rule of an op leaves this call to what says it of layouts alone."""
        if len(args) < 2:
            return False
        if func is aten.split_with_sizes.default:
            dim = args[2] if len(args) > 2 else 0
            adds_up = sum(args[1]) == args[0].shape[dim]
            return adds_up and not all(size == 1 for size in args[1])
        if func in _INDEXED:
            return not _has_mask(args[1]) and not has_values(args[0])
        return False

    def answer(self, mode: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Answer one op, or return NotImplemented where values do not matter."""
        rule = self._rules.get(func)
        if rule is None and _is_nms(func):
            rule = self._nms
        if rule is not None:
            exact = self._exact(mode, func, args, kwargs)
            return rule(mode, *args, **kwargs) if exact is NotImplemented else exact
        # in place: no memory, and nothing else to do for hundreds of tensors
        return None if _is_silent(func) else NotImplemented

    def follow(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Remember what follows for the elements of the result of an op that has just run."""
        name = func._opname
        follow_placeholders(name, args, kwargs, output)
        if name in _WITH_INFO:
            set_placeholder(output[-1], 0)
            set_certain(output[-1])
        else:
            follow_varied(name, args, kwargs, output, self._guesses.share)
            # such a count may be read, and a size may follow from it
            if name in _COUNTS and not output.dim() and (part := true_part(args[0])) is not None:
                self._parts[part] = None
        self.known.follow(func, args, kwargs, output)

    def is_silent(self, func: Any, tensors: Sequence[Tensor], output: Any) -> bool:
        """Whether nothing follows from calls of an op, as from one with these layouts.

        Args:
            func: the op.
            tensors: its arguments, of whose elements nothing is known.
            output: its result, after `follow`.
        """
        made = output if isinstance(output, (list, tuple)) else (output,)
        is_known = any(isinstance(part, Tensor) and not is_plain(part) for part in made)
        return bool(tensors) and not is_known and self.known.only_reads(func)

    def notes(self) -> Iterator[str]:
        """Say which shapes of the run were bounded, taken to be equal, or those of the sample."""
        if self._upper_bounds:
            yield (
                f"shapes that depend on values ({', '.join(sorted(self._upper_bounds))}) took "
                "their upper bound: the real run may need less memory"
            )
        if self._split_equally:
            yield (
                "sizes of parts that depend on values (split) were taken to be equal: the real run "
                "may need more memory or less"
            )
        if self._exact_shapes:
            yield (
                f"shapes that depend on values ({', '.join(sorted(self._exact_shapes))}) followed "
                "those of the sample: a run on others may need more memory"
            )

    def _exact(self, mode: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Answer an op whose result's shape depends on values where they are known."""
        if torch.Tag.dynamic_output_shape not in func.tags:
            return NotImplemented
        made = self.known.result(func, args, kwargs)
        if made is NotImplemented:
            return NotImplemented
        self._exact_shapes.add(func._opname.lstrip("_").rstrip("2"))
        if isinstance(made, Tensor):
            return mode.empty(tuple(made.shape), made.dtype, args[0])
        return tuple(mode.empty(tuple(part.shape), part.dtype, args[0]) for part in made)

    def _read(self, mode: Any, tensor: Any) -> Any:
        known = values_of(tensor)
        if known is not None:
            return known.item()
        if is_certain(tensor):
            return placeholder_of(tensor)
        self._reads += tensor.dtype is torch.bool or self._guesses.is_trying
        if self._reads > (_MOST_READS_TRYING if self._guesses.is_trying else _MOST_READS):
            raise WorkloadError(
                f"the workload asked {_MOST_READS:,} times whether something holds on the GPU, "
                "which a simulation cannot know: a loop that ends by such a value never ends here"
            )
        if is_unbounded(tensor):
            self._guesses.number_compared()
        return self._guesses.answer(placeholder_of(tensor), most_of(tensor))

    def _equal(self, mode: Any, one: Tensor, other: Tensor) -> Any:
        if one is other or one.shape != other.shape:
            return one is other
        return self._guesses.answer(True)

    def _true_elements(self, mask: Tensor, name: str) -> int:
        """Return how many elements of a mask are true, at most."""
        known = values_of(mask)
        if known is not None:
            self._exact_shapes.add(name)
            return int(known.count_nonzero())
        count = true_count(mask)
        if count is None and (part := true_part(mask)) is not None:
            self._parts[part] = None
            return rounded_up(part)
        if count is None:
            self._upper_bounds.add(name)
            return mask.numel()
        return count

    def _nonzero(self, mode: Any, tensor: Tensor) -> Any:
        count = self._true_elements(tensor, "nonzero")
        places = mode.empty((count, tensor.dim()), torch.int64, tensor)
        mark_upper_bound(places)
        set_placeholder(places, 0)  # the first place is one in every tensor
        return places

    def _nms(self, mode: Any, boxes: Tensor, *args: Any) -> Any:
        """Keep every box."""
        self._upper_bounds.add("nms")
        kept = mode.empty((boxes.shape[0],), torch.int64, boxes)
        set_bounds(kept, 0, max(0, boxes.shape[0] - 1))
        set_placeholder(kept, 0)
        return kept

    def _masked_select(self, mode: Any, tensor: Tensor, mask: Tensor) -> Any:
        shape = torch.broadcast_shapes(tensor.shape, mask.shape)
        count = self._true_elements(mask.expand(shape), "masked_select")
        picked = mode.empty((count,), tensor.dtype, tensor)
        mark_upper_bound(picked)
        return picked

    def _unique(
        self,
        mode: Any,
        tensor: Tensor,
        dim: int | None,
        inverse: bool = False,
        counts: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Count every element, or every slice along a dimension, as different from the others."""
        self._upper_bounds.add("unique")
        shape = tuple(tensor.shape)
        bounds = bounds_of(tensor)
        size = tensor.numel() if dim is None else shape[dim]
        if bounds is not None and dim is None:
            size = min(size, bounds[1] - bounds[0] + 1)
        places = shape if dim is None else (size,)
        return (
            mode.empty((size,) if dim is None else shape, tensor.dtype, tensor),
            mode.empty(places if inverse else (0,), torch.int64, tensor),
            mode.empty((size if counts else 0,), torch.int64, tensor),
        )

    def _bincount(
        self, mode: Any, tensor: Tensor, weights: Tensor | None = None, minlength: int = 0
    ) -> Any:
        self._upper_bounds.add("bincount")
        dtype = torch.int64 if weights is None else weights.dtype
        bounds = bounds_of(tensor)
        size = tensor.numel() if bounds is None else bounds[1] + 1
        return mode.empty((max(minlength, size),), dtype, tensor)

    def _repeat_interleave(
        self, mode: Any, repeats: Tensor, *, output_size: int | None = None
    ) -> Any:
        if output_size is None:  # each repeat reads as one
            self._upper_bounds.add("repeat_interleave")
            output_size = repeats.numel()
        return mode.empty((output_size,), repeats.dtype, repeats)

    def _index(self, mode: Any, tensor: Tensor, indices: Sequence[Tensor | None]) -> Any:
        """Replace every mask by the places where it is true."""
        if not _has_mask(indices):
            return NotImplemented
        places: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in MASKS:
                places.append(index)
            else:
                places.extend(mode.run(aten.unbind.int, self._nonzero(mode, index), 1))
        return mode.run(aten.index.Tensor, tensor, places)

    def _split(self, mode: Any, tensor: Tensor, sizes: Sequence[int], dim: int = 0) -> Any:
        """Split a tensor into equal parts where the sizes were read from the GPU and are unknown.

        Mixtures of experts do so: the sizes are counts of tokens, which add up to all of them.
        Each count reads as one. The last part has what is left over, so that all sizes follow one
        count, and the number of all tokens.
        """
        total, parts = tensor.shape[dim], len(sizes)
        if not parts or any(size != 1 for size in sizes):
            return NotImplemented
        self._split_equally = self._split_equally or total != parts
        part = Fraction(total - parts + 1, parts)  # rounded up it is a share that is rounded down
        self._parts[part] = None
        size = rounded_up(part)
        equal = [*([size] * (parts - 1)), total - size * (parts - 1)]
        return mode.run(aten.split_with_sizes.default, tensor, equal, dim)


def _is_nms(func: Any) -> bool:
    return bool(func.namespace == "torchvision" and func._opname == "nms")


def _is_silent(func: Any) -> bool:
    """Whether an op writes to lists of tensors."""
    name = func._opname
    return bool(name.endswith("_") and name.startswith(("_foreach_", "_fused_")))


def _unscale(mode: Any, grads: Any, found_inf: Tensor, inv_scale: Any) -> None:
    set_placeholder(found_inf, 0.0)
    set_certain(found_inf)


def _embedding(mode: Any, *args: Any) -> Any:
    return _dense(len(args) > 4 and args[4])


def _embedding_bag(mode: Any, *args: Any) -> Any:
    return _dense(len(args) > 5 and args[5])


def _dense(is_sparse: bool) -> Any:
    """Refuse an embedding whose gradient would be sparse.

    Raises:
        WorkloadError: it would.
    """
    if is_sparse:
        raise WorkloadError(
            "sparse gradients of an embedding cannot be simulated: build it with sparse=False"
        )
    return NotImplemented


def _index_put(
    mode: Any,
    tensor: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    *rest: Any,
    copies: bool = False,
) -> Any:
    """Write where a mask is true; the number of rows to write tells how many elements are."""
    if not _has_mask(indices):
        return NotImplemented
    masks = [index for index in indices if index is not None]
    if len(masks) == 1 and indices[0] is not None:
        mask = masks[0]
        is_a_row_each = values.dim() == tensor.dim() - mask.dim() + 1 and values.shape[0] != 1
        if is_a_row_each and values.shape[0] <= mask.numel():
            set_true_count(mask, values.shape[0])  # the gradient of the rows will ask for it
    return mode.run(aten.clone.default, tensor) if copies else tensor


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in MASKS for index in indices)
