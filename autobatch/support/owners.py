"""Whose code is, by its file: Python's, an installed package's, autobatch's or the user's own."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from pathlib import Path
from types import FunctionType, ModuleType

__all__ = [
    "OURS",
    "is_installed",
    "is_own_class",
    "is_own_file",
    "is_own_function",
    "is_own_module",
]

OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
"""The folder of autobatch, as the paths of its files begin."""

_STANDARD = tuple(os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib"))
_SITES = frozenset(("site-packages", "dist-packages"))


def is_installed(file: str) -> bool:
    """Whether a file is of the standard library or of an installed package.

    >>> is_installed(os.__file__), is_installed("/home/me/train.py")
    (True, False)
    """
    return file.startswith(_STANDARD) or not _SITES.isdisjoint(Path(file).parts)


@functools.cache
def is_own_file(file: str) -> bool:
    """Whether a file is the user's: none of Python's, of an installed package, or autobatch's."""
    return not (file.startswith((OURS, "<frozen")) or is_installed(file))


def is_own_function(function: FunctionType) -> bool:
    """Whether a function was written by the user, so that its globals may be state."""
    return is_own_file(function.__code__.co_filename)


def is_own_class(kind: type) -> bool:
    """Whether a class was written by the user."""
    module = sys.modules.get(kind.__module__)
    return module is not None and is_own_module(module)


def is_own_module(module: ModuleType) -> bool:
    """Whether a module was written by the user; what is typed in has no file."""
    file = getattr(module, "__file__", None)
    return module.__name__ == "__main__" if file is None else is_own_file(file)
