"""How many processes train together."""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["ranks_here"]


def ranks_here(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks of a process group, by default of all; 1 where there is none."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
