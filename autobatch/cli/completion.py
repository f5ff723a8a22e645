"""Completion of commands, options and GPUs by the shell; the only user of argcomplete."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from autobatch.support.installing import install_line

if TYPE_CHECKING:
    import argparse

__all__ = ["HOW", "complete"]

HOW = (
    "completion of commands, options and GPUs with the tab key:\n"
    f"  {install_line('completion')}\n"
    '  eval "$(register-python-argcomplete autobatch)"    # into ~/.bashrc or ~/.zshrc'
)
"""What a user does to have it."""


def complete(parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Answer a shell that asks what could be typed, and end the process; else do nothing."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    try:
        import argcomplete
    except ModuleNotFoundError:  # removed since the shell was set up
        return
    argcomplete.autocomplete(parser())
