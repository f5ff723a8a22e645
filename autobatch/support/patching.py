"""Replace attributes for the length of a block; they are back afterwards whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["patched"]


@contextlib.contextmanager
def patched(target: Any, **replacements: Any) -> Iterator[None]:
    """Set attributes of a module or class, and restore the originals at the end."""
    originals = {name: getattr(target, name) for name in replacements}
    try:
        for name, replacement in replacements.items():
            setattr(target, name, replacement)
        yield
    finally:
        for name, original in originals.items():
            setattr(target, name, original)
