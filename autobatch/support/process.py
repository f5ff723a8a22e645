"""Whose process this is: the command line's own, or somebody's who imported the library."""

from __future__ import annotations

__all__ = ["claim", "is_ours"]

_ours = False


def claim() -> None:
    """Declare that nothing but autobatch runs in this process; the console script does."""
    global _ours
    _ours = True


def is_ours() -> bool:
    """Return whether registering a device for good disturbs nobody."""
    return _ours
