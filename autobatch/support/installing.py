"""How to install what is missing.

Invariant: the line works as it stands. The package is on no index, so it comes from its repository.
"""

from __future__ import annotations

__all__ = ["REPOSITORY", "install_line"]

REPOSITORY = "https://github.com/autobatch/autobatch"


def install_line(extra: str = "") -> str:
    """Return the command that installs autobatch with the libraries of an extra.

    >>> install_line("hf")
    'pip install "autobatch-gpu[hf] @ git+https://github.com/autobatch/autobatch"'
    """
    name = f"autobatch-gpu[{extra}]" if extra else "autobatch-gpu"
    return f'pip install "{name} @ git+{REPOSITORY}"'
