"""What a process on simulated cards can ask of them."""

from __future__ import annotations

import ctypes
import os

__all__ = ["card_full_at", "is_on_the_bench"]


def is_on_the_bench() -> bool:
    """Return whether this process runs on simulated cards, whose kernels compute nothing."""
    return "CARD_GPU" in os.environ


def card_full_at(n: int) -> None:
    """Let a card be full when this process asks it for memory for the n-th time from now.

    Others have then taken all but what is in use, or was in use at this call if that was more.
    0 gives the memory back.
    """
    ctypes.CDLL("card_core.so").card_full_at(ctypes.c_size_t(n))
