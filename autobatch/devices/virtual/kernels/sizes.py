"""Sizes that kernels' rules have in common."""

from __future__ import annotations

from torch import Tensor

__all__ = ["ceil_div", "copies_of", "round_up"]


def ceil_div(number: int, by: int) -> int:
    """Return how many parts of a size hold a number of elements.

    >>> ceil_div(9, 4), ceil_div(8, 4)
    (3, 2)
    """
    return -(-number // by)


def round_up(number: int, to: int) -> int:
    """Return the next multiple.

    >>> round_up(9, 4), round_up(8, 4)
    (12, 8)
    """
    return -(-number // to) * to


def copies_of(*tensors: Tensor) -> list[int]:
    """Return the bytes of copies, one of each tensor that is not contiguous."""
    return [tensor.nbytes for tensor in tensors if not tensor.is_contiguous()]
