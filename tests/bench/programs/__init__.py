"""Programs that tests run in child processes, on simulated cards; each tells JSON at its end."""

from __future__ import annotations

import json
import time
from typing import Any

__all__ = ["tell"]


def tell(found: Any) -> None:
    """Print what was found, and let other threads end what they do.

    A thread of autograd that drops a finished graph while Python ends aborts the process; PyTorch
    waits for none.
    """
    print(json.dumps(found), flush=True)
    time.sleep(0.1)
