"""Settings of the environment with which the import of PyTorch ends the process.

Invariant: nothing is refused with which PyTorch can be imported; this module does not import it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from autobatch.errors import UsageError
from autobatch.memory.allocator_settings import VARIABLES, is_well_formed

__all__ = ["require_importable_torch"]


def require_importable_torch() -> None:
    """See that PyTorch does not abort this process over the allocator's settings.

    Which texts it aborts over depends on its version and build. So only texts of another form than
    the documented one are tried, by an import in a process of its own.

    Raises:
        UsageError: it would; the message names the variable.
    """
    wrong = [name for name in VARIABLES if not is_well_formed(os.environ.get(name, ""))]
    if not wrong or not _import_aborts():
        return
    name = wrong[-1]  # PyTorch's import reads the older name first
    raise UsageError(
        f"{name} is {os.environ[name]!r}, with which PyTorch aborts the process as it is imported: "
        "write key:value,key:value such as expandable_segments:True,max_split_size_mb:128, or "
        "unset it"
    )


def _import_aborts() -> bool:
    tried = subprocess.run(
        [sys.executable, "-c", "import torch"], capture_output=True, stdin=subprocess.DEVNULL
    )
    return tried.returncode == -signal.SIGABRT
