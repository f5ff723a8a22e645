"""Whose a file of code is, by its path: Python's, that of an installed package, or autobatch's."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

__all__ = ["OURS", "is_installed"]

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
