"""Ops that write their result into the memory of their first argument on a real GPU.

PyTorch's C++ code adds in place where nobody else sees it, but never for tensor subclasses such as
fake tensors (`isTensorSubclassLike` in `ATen/TensorSubclassLikeUtils.h`, and the autograd engine's
`can_accumulate_inplace` in `torch/csrc/autograd/input_buffer.cpp`). So a simulation has to:

- the engine sums the gradients of a tensor that feeds several ops;
- a linear layer adds its bias to the product (`linear` in `ATen/native/Linear.cpp`), and attention
  its mask to the scores (`_scaled_dot_product_attention_math` in
  `ATen/native/transformers/attention.cpp`);
- the gradient of an indexed tensor is put into zeros (`index_backward` in
  `torch/csrc/autograd/FunctionsManual.cpp` and its like);
- some formulas of gradients go on writing into what they have made (`_FORMULAS`).

Whether nobody else holds a tensor shows in its reference counts. Which counts mean that differs
between versions of PyTorch and Python, so they are counted once, in a sum made for that.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.support.torch_private import (
    FakeTensor,
    FakeTensorMode,
    current_autograd_node,
    current_graph_task_id,
    storage_use_count,
    torch_version,
)

__all__ = ["MAY_WRITE_IN_PLACE", "holders_of_a_sum", "writes_in_place"]

aten = torch.ops.aten

_ADD = aten.add.Tensor
_PRODUCTS = ("aten::mm", "aten::bmm")
_ZEROS = ("aten::zeros", "aten::new_zeros", "aten::zeros_like")
_INTO_ZEROS = frozenset(
    (
        aten.index_put.default,
        aten.scatter_add.default,
        aten.index_add.default,
        aten.scatter.src,
        aten.put.default,
        aten.masked_scatter.default,
    )
)
_OLDER_CLAMP = ("Clamp",) if torch_version() <= (2, 12) else ()
"""From PyTorch 2.14 on, and perhaps before, its masks are new ones."""

_FORMULAS = {
    aten.masked_fill.Scalar: ("Maximum", "Minimum", "Clamp", "ClampMin", "ClampMax"),
    aten.index_fill.int_Tensor: ("Trace",),
    aten.logical_and.default: ("Max", "Min", "Median", "Nanmedian", *_OLDER_CLAMP),
    aten.logical_or.default: _OLDER_CLAMP,
    aten.sub.Tensor: ("BinaryCrossEntropyWithLogits",),
    aten.mul.Tensor: ("BinaryCrossEntropyWithLogits", "BinaryCrossEntropy"),
}
"""By op: in whose formulas it writes into a tensor that the formula has made, if alone it holds it
(`tools/autograd/derivatives.yaml` and `torch/csrc/autograd/FunctionsManual.cpp`)."""

MAY_WRITE_IN_PLACE = _INTO_ZEROS | _FORMULAS.keys() | {_ADD}
"""The ops to ask about."""

_Holders = tuple[int, int, int]
"""How many references there are to a tensor in C++, to its storage, and to it in Python."""


def writes_in_place(func: Any, args: Sequence[Any], latest: str | None, sole: _Holders) -> bool:
    """Whether an op that is called out of place writes into its first argument on a real GPU.

    Args:
        func: the op.
        args: its arguments, as `__torch_dispatch__` got them.
        latest: the op that made the first argument, if nothing was allocated since.
        sole: the holders of a tensor that only C++ code holds.
    """
    if func in _INTO_ZEROS:
        return latest in _ZEROS and _is_in_engine()
    if func in _FORMULAS:
        return (
            _is_in_engine()
            and _formula() in _FORMULAS[func]
            and _holders(args)[0] <= sole[0] + 1  # what came to the formula is held by more
            and _has_room(args)
        )
    if func is not _ADD or not all(isinstance(term, FakeTensor) for term in args):
        return False
    if args[0].shape == args[1].shape and args[0].dtype is args[1].dtype:
        is_sum = _is_in_engine()
    else:
        is_sum = latest in _PRODUCTS and args[1].dim() <= args[0].dim()
    return is_sum and _is_dense(args[0]) and _holders(args) == sole


def _is_in_engine() -> bool:
    return current_graph_task_id() >= 0 and not torch.is_grad_enabled()


def _formula() -> str:
    """Name the op whose gradient the engine works out; "" where a user's function does."""
    node = current_autograd_node()
    name, found, _ = "" if node is None else node.name().partition("Backward")
    return name if found else ""


def _has_room(args: Sequence[Any]) -> bool:
    """Whether the result of an op of two tensors, or of one and a number, is as large as the first.

    >>> _has_room((torch.empty(3), torch.empty(2, 3)))
    False
    """
    shapes = [arg.shape for arg in args[:2] if isinstance(arg, Tensor)]
    return bool(torch.broadcast_shapes(*shapes) == shapes[0])


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill its memory without gaps or overlaps, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _holders(args: Sequence[Any]) -> _Holders:
    storage = storage_use_count(args[0].untyped_storage()._cdata)
    return args[0]._use_count(), storage, sys.getrefcount(args[0])


@functools.cache
def holders_of_a_sum() -> _Holders:
    """Return the holders of a gradient that only this PyTorch's engine holds, while it adds."""
    anomalies = torch.autograd.set_detect_anomaly  # the user's would read values that do not exist
    with anomalies(False), torch.inference_mode(False), torch.enable_grad(), _Watch() as watch:
        x = torch.ones(2, device="cpu", requires_grad=True)
        (x.neg() + x.neg()).sum().backward()  # nothing is saved: hooks of the user's see nothing
    assert watch.holders is not None, "the engine made no sum"
    return watch.holders


class _Watch(FakeTensorMode):
    """Counts the holders of the first sum that the engine makes."""

    holders: _Holders | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is _ADD and current_graph_task_id() >= 0 and self.holders is None:
            self.holders = _holders(args)
        return super().__torch_dispatch__(func, types, args, kwargs)
