"""What an answer says of itself: with which versions it was found, and when."""

from __future__ import annotations

import platform
from datetime import datetime, timezone

import torch

from autobatch import _version

__all__ = ["created_now", "versions"]


def versions() -> dict[str, str]:
    """Return the versions that figures depend on."""
    return {
        "autobatch": _version.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def created_now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
