"""What is known of the elements of a tensor that has no memory.

A fake tensor may have a *placeholder*: the one value that each of its elements reads as. Its
storage may have a *mirror*: real memory on the CPU with the bytes that the device would hold, which
all views share. The storage of a mask may also tell how many of its elements are true.

Invariant: these facts are attributes of the tensor and of its storage, and nothing outside of this
module knows their names. A mirror is right or absent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autobatch.support.torch_private import DisableTorchFunction, FakeTensor, no_dispatch

__all__ = [
    "KEPT_ELEMENTS",
    "WHOLE",
    "bounds_of",
    "explicit_placeholder",
    "forget_placeholder",
    "forget_values",
    "has_values",
    "is_certain",
    "is_mixed",
    "is_plain",
    "is_unbounded",
    "is_varied",
    "known_number",
    "mark_upper_bound",
    "mixed_share",
    "most_of",
    "note_write",
    "origin_of",
    "placeholder_of",
    "set_bounds",
    "set_certain",
    "set_mixed",
    "set_most",
    "set_placeholder",
    "set_true_count",
    "set_unbounded",
    "set_values",
    "true_count",
    "values_of",
    "was_upper_bound",
    "was_zero",
]

KEPT_ELEMENTS = 2**14
"""Elements, per sample of the micro-batch, up to which a result is known.

The limit grows with the micro-batch, so that what is known at one micro-batch is known at any: its
results may decide which ops run.
"""

WHOLE = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool))
"""Dtypes of whole numbers and truth values."""

_OF_TENSORS = frozenset(("placeholder", "certain", "unbounded", "most", "bounds", "mixed"))
_OF_STORAGES = frozenset(("mirror", "true_count", "upper_bound"))
"""What may be known, by the names of attributes."""

_FLOAT = 0.6  # x, 1 - x and x - 0.5 are all positive: few thresholds are met exactly


def is_plain(tensor: Tensor) -> bool:
    """Whether nothing is known of a tensor's elements, nor of the memory that it shares."""
    storage = tensor.untyped_storage()
    return _OF_TENSORS.isdisjoint(vars(tensor)) and _OF_STORAGES.isdisjoint(vars(storage))


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


def explicit_placeholder(value: Any) -> float | None:
    """Return the placeholder that a tensor was given, or a plain number; None for the default."""
    known = vars(value).get("placeholder") if isinstance(value, Tensor) else value
    return None if known is None else float(known)


def set_placeholder(tensor: Tensor, value: float) -> None:
    """Let every element of a tensor read as a value."""
    vars(tensor)["placeholder"] = value


def forget_placeholder(tensor: Tensor, *, keeps_bounds: bool = False) -> None:
    """Let a tensor that was written to read as its dtype's default, and its true elements too."""
    vars(tensor)["before"] = vars(tensor).get("placeholder")
    facts = (
        "placeholder",
        "mixed",
        "certain",
        "most",
        "unbounded",
        *(() if keeps_bounds else ("bounds",)),
    )
    for fact in facts:
        vars(tensor).pop(fact, None)
    vars(tensor.untyped_storage()).pop("true_count", None)


def set_certain(tensor: Tensor) -> None:
    """Remember that what a tensor reads as is what a healthy run gives: no NaN was found, say.

    That is so until the tensor, or another that shares its memory, is written to.
    """
    vars(tensor)["certain"] = _writes(tensor)


def is_certain(value: Any) -> bool:
    """Whether a tensor reads as what a healthy run gives."""
    return isinstance(value, Tensor) and vars(value).get("certain") == _writes(value)


def note_write(tensor: Tensor) -> None:
    """Remember that the memory of a tensor was written to."""
    vars(tensor.untyped_storage())["writes"] = _writes(tensor) + 1


def _writes(tensor: Tensor) -> int:
    count: int = vars(tensor.untyped_storage()).get("writes", 0)
    return count


def set_unbounded(tensor: Tensor) -> None:
    """Remember that a truth value compares a whole number of which nothing is known."""
    vars(tensor)["unbounded"] = True


def is_unbounded(tensor: Any) -> bool:
    """Whether a truth value compares a whole number of which nothing is known."""
    return isinstance(tensor, Tensor) and "unbounded" in vars(tensor)


def set_most(tensor: Tensor, most: int) -> None:
    """Remember what the one whole number of a tensor may be at most."""
    vars(tensor)["most"] = most


def most_of(tensor: Any) -> int | None:
    """Return what the one whole number of a tensor may be at most, if that was told."""
    return vars(tensor).get("most") if isinstance(tensor, Tensor) else None


def was_zero(tensor: Tensor) -> bool:
    """Whether every element of a tensor read as zero before the last op that wrote to it."""
    return vars(tensor).get("before") == 0


def set_bounds(tensor: Tensor, low: int, high: int, origin: object = None) -> None:
    """Remember between which whole numbers the elements of a tensor vary, in unknown order.

    `origin` stands for the choice that the numbers were made by, for all views and copies of them.
    """
    vars(tensor)["bounds"] = low, high
    vars(tensor)["origin"] = origin if origin is not None else object()


def bounds_of(tensor: Any) -> tuple[int, int] | None:
    """Return the smallest and largest number that an element may be, if that was told."""
    return vars(tensor).get("bounds") if isinstance(tensor, Tensor) else None


def origin_of(tensor: Any) -> object:
    """Return what stands for the choice that a tensor's numbers were made by."""
    return vars(tensor).get("origin") if isinstance(tensor, Tensor) else None


def is_varied(tensor: Any) -> bool:
    """Whether a tensor's elements are whole numbers that may be any within bounds."""
    return bounds_of(tensor) is not None and values_of(tensor) is None


def set_mixed(tensor: Tensor, share: float) -> None:
    """Let some elements of a tensor be true (or not zero) and others false.

    Args:
        tensor: a mask, or the numbers that one was made.
        share: how many of them are true, at most: 1.0 where nothing is known of it.
    """
    vars(tensor)["mixed"] = share


def is_mixed(tensor: Any) -> bool:
    """Whether some elements of a tensor are true and others are false."""
    return mixed_share(tensor) is not None


def mixed_share(tensor: Any) -> float | None:
    """Return which share of the elements of a mixed tensor is true; None of any other tensor."""
    return vars(tensor).get("mixed") if isinstance(tensor, Tensor) else None


def mark_upper_bound(tensor: Tensor) -> None:
    """Remember that a tensor has as many elements as its shape may have at most."""
    vars(tensor.untyped_storage())["upper_bound"] = True


def was_upper_bound(tensor: Tensor) -> bool:
    """Whether a tensor, or what it views, has more elements than it may really have."""
    return "upper_bound" in vars(tensor.untyped_storage())


def set_true_count(mask: Tensor, count: int) -> None:
    """Remember how many elements of a mask are true."""
    vars(mask.untyped_storage())["true_count"] = _layout(mask), count


def true_count(mask: Tensor) -> int | None:
    """Return how many elements of a mask are true, if it was told of a mask of this layout."""
    known: tuple[Any, int] | None = vars(mask.untyped_storage()).get("true_count")
    return known[1] if known is not None and known[0] == _layout(mask) else None


def set_values(fake: Tensor, real: Tensor) -> None:
    """Let a tensor without memory have the values of a real one of its shape, on the CPU."""
    storage = fake.untyped_storage()
    with no_dispatch():
        memory = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu")
        vars(storage)["mirror"] = memory.untyped_storage()
        into = _over(memory.untyped_storage(), fake)
        for dim, stride in enumerate(into.stride()):  # rows of an expanded tensor are one row
            if stride == 0 and into.shape[dim] > 1:
                into, real = into.narrow(dim, 0, 1), real.narrow(dim, 0, 1)
        into.copy_(real)


def has_values(fake: Tensor) -> bool:
    """Whether a tensor without memory has values, its own or those of the tensor it views."""
    return "mirror" in vars(fake.untyped_storage())


def forget_values(fake: Tensor) -> None:
    """Let a tensor without memory, and every view of it, have no values."""
    vars(fake.untyped_storage()).pop("mirror", None)


def values_of(tensor: Tensor) -> Tensor | None:
    """Return a tensor's elements, on the CPU, in memory that its views share; None if unknown.

    A real tensor that meets fake ones has its values where it is a number, or small and of whole
    numbers.
    """
    if type(tensor) is not FakeTensor:
        is_few = not tensor.dim() or (tensor.dtype in WHOLE and tensor.numel() <= KEPT_ELEMENTS)
        is_plain = type(tensor) is Tensor and tensor.device.type == "cpu"
        return tensor if is_plain and is_few else None
    storage = tensor.untyped_storage()
    mirror = vars(storage).get("mirror")
    if mirror is None or mirror.nbytes() != storage.nbytes():  # resized since
        return None
    with no_dispatch():
        return _over(mirror, tensor)


def known_number(fake: FakeTensor) -> Any:
    """Return the one element of a tensor without memory; None if it has more, or is unknown."""
    with DisableTorchFunction():
        if fake.dim() or "mirror" not in vars(fake.untyped_storage()):
            return None
        known = values_of(fake)
        if known is None:
            return None
        with no_dispatch():
            return known.item()


def _over(storage: torch.UntypedStorage, tensor: Tensor) -> Tensor:
    """Return a real tensor over a storage, in the layout of a fake one."""
    values = torch.empty((), dtype=tensor.dtype, device="cpu")
    return values.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
