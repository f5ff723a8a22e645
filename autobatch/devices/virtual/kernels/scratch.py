"""What a kernel allocates beside its results, and gives back before it returns."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AFTER_ALL", "TO_THE_END", "Scratch"]

AFTER_ALL = 2**31
"""More results than any op has."""

TO_THE_END = 2**31
"""More scratch than any op takes."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """One allocation that a kernel makes for itself.

    Attributes:
        size_bytes: as requested.
        after: how many of the op's new storages are allocated before it.
        outlives: how many later pieces of the op's scratch are taken before it is given back.
    """

    size_bytes: int
    after: int = AFTER_ALL
    outlives: int = TO_THE_END
