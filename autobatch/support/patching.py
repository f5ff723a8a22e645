"""Replace what others see for the length of a block; it is back afterwards whatever happens."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

__all__ = ["environment_kept", "patched"]


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    """Put the variables of the environment back that the block sets, as some imports do.

    Child processes would inherit them.

    >>> with environment_kept():
    ...     os.environ["AUTOBATCH_EXAMPLE"] = "set"
    >>> "AUTOBATCH_EXAMPLE" in os.environ
    False
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({k: v for k, v in before.items() if os.environ.get(k) != v})


@contextlib.contextmanager
def patched(target: Any, **replacements: Any) -> Iterator[None]:
    """Set attributes of a module or class, and restore the originals at the end."""
    own = vars(target) if isinstance(target, type) else {}  # a class's own, as they are
    originals = {name: own.get(name, getattr(target, name)) for name in replacements}
    try:
        for name, replacement in replacements.items():
            setattr(target, name, replacement)
        yield
    finally:
        for name, original in originals.items():
            setattr(target, name, original)
