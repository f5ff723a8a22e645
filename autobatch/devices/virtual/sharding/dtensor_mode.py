"""Ops on DTensors, which PyTorch takes apart into ops on their local parts.

Invariant: an op takes the memory that it takes when DTensor runs it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.fake_mode import VirtualMode
from autobatch.support.torch_private import OpOverload

__all__ = ["rank_mode"]

_UNSCALE = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default
_REDUCTIONS = frozenset(("_foreach_norm", "_foreach_max", "_foreach_powsum"))


@functools.cache
def rank_mode() -> type[VirtualMode]:
    """Return a mode that leaves ops to DTensor, which calls again with the local parts.

    Two ops are answered at once: GradScaler's check, whose answer would get lost in DTensor's
    reduction over ranks, and an optimizer's ops on lists of tensors, for which DTensor takes time
    by the square of their length.
    """
    from torch.distributed.tensor import DTensor

    class RankMode(VirtualMode):
        def __torch_dispatch__(
            self,
            func: OpOverload,
            types: Sequence[type],
            args: Sequence[Any] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            if DTensor not in types:
                return super().__torch_dispatch__(func, types, args, kwargs)
            if func is _UNSCALE:
                return super().__torch_dispatch__(func, (), args, kwargs)
            local = _local_lists(func, args, kwargs or {})
            if local is None:
                return NotImplemented
            made = super().__torch_dispatch__(func, (), local, kwargs)
            if made is None:  # in place
                return None
            first = args[0]
            return [
                DTensor(tensor, of._spec, requires_grad=False)
                for tensor, of in zip(made, first, strict=True)
            ]

    return RankMode


def _local_lists(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any] | None:
    """Return an op's arguments with lists of DTensors replaced by lists of their local parts.

    None unless the op is elementwise on lists of tensors that are all sharded alike.
    """
    name = func._opname
    if not name.startswith("_foreach_") or name in _REDUCTIONS:
        return None
    if any(isinstance(value, (Tensor, list, tuple)) for value in kwargs.values()):
        return None
    local: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            return None
        if isinstance(arg, (list, tuple)) and isinstance(arg[0], Tensor):
            if len(arg) != len(args[0]) or not all(map(_sharded_alike, arg, args[0])):
                return None
            arg = [tensor._local_tensor for tensor in arg]
        local.append(arg)
    return local


def _sharded_alike(tensor: Any, other: Any) -> bool:
    ours, theirs = getattr(tensor, "_spec", None), getattr(other, "_spec", None)
    if ours is None or theirs is None:
        return False
    return bool(ours.placements == theirs.placements and ours.mesh == theirs.mesh)
