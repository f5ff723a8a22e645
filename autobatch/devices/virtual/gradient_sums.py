"""Sums of gradients as the autograd engine makes them on a real GPU.

Where a tensor feeds several ops, the engine adds their gradients into the first one's memory, if
nobody else holds it (`can_accumulate_inplace` in `torch/csrc/autograd/input_buffer.cpp`). It never
does so for tensor subclasses such as fake tensors, so a simulation has to.

Whether nobody else holds a gradient shows in its reference counts. Which counts mean that differs
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
    current_graph_task_id,
    storage_use_count,
)

__all__ = ["adds_in_place", "holders_of_a_sum"]

_ADD = torch.ops.aten.add.Tensor

_Holders = tuple[int, int, int]
"""How many references there are to a tensor in C++, to its storage, and to it in Python."""


def adds_in_place(func: Any, args: Sequence[Any], sole: _Holders) -> bool:
    """Whether an op is the engine's sum of two gradients, made in the memory of the first.

    Args:
        func: the op.
        args: its arguments, as `__torch_dispatch__` got them.
        sole: the holders of a gradient that only the engine holds.
    """
    return (
        func is _ADD
        and current_graph_task_id() >= 0
        and not torch.is_grad_enabled()
        and all(isinstance(term, FakeTensor) for term in args)
        and args[0].shape == args[1].shape
        and args[0].dtype is args[1].dtype
        and _is_dense(args[0])
        and _holders(args) == sole
    )


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
    with torch.enable_grad(), _Watch() as watch:
        x = torch.ones(2, requires_grad=True)
        (x.exp() + x.tanh()).sum().backward()
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
