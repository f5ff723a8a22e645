"""Tensors that consist of others: shards, quantized weights, and other subclasses.

Invariant: a subclass tells what it is made of (`__tensor_flatten__`); nothing of it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["is_composed", "parts_of", "recomposed"]


def is_composed(value: Any) -> bool:
    """Whether a value is a tensor whose class keeps its numbers in other tensors."""
    return isinstance(value, Tensor) and _takes_apart(type(value))


def _takes_apart(kind: type) -> bool:
    return (
        kind not in (Tensor, nn.Parameter)
        and hasattr(kind, "__tensor_flatten__")
        and hasattr(kind, "__tensor_unflatten__")
    )


def parts_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that hold the bytes of a tensor on this rank; most are their own only part.

    >>> import torch
    >>> [part.shape for part in parts_of(torch.ones(2))]
    [torch.Size([2])]
    """
    local = getattr(tensor, "_local_tensor", None)  # a DTensor's
    if isinstance(local, Tensor):
        yield from parts_of(local)
    elif is_composed(tensor):
        composed: Any = tensor
        names, _ = composed.__tensor_flatten__()
        for name in names:
            yield from parts_of(getattr(tensor, name))
    else:
        yield tensor


def recomposed(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a tensor of the same class, made of other tensors than the one that is given.

    `change` gets each part, and returns the one in its place.
    """
    composed: Any = tensor
    names, context = composed.__tensor_flatten__()
    inner = {name: change(getattr(tensor, name)) for name in names}
    made: Tensor = type(composed).__tensor_unflatten__(
        inner, context, tensor.size(), tensor.stride()
    )
    return made
