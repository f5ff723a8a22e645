"""What a run says of training that would fail, grow, or train less than it seems to.

Invariant: each is one line that says what was seen, and what to do.
"""

from __future__ import annotations

from collections.abc import Collection

from autobatch.support.wording import count

__all__ = ["without_gradients"]


def without_gradients(names: Collection[str], trained: int) -> list[str]:
    """Say which of the trained parameters never got a gradient."""
    if not names:
        return []
    return [
        f"{count(len(names), 'parameter')} of the {trained:,} that are trained never got a "
        f"gradient, such as {min(names)}: its state and gradient are not in the account, and "
        "DistributedDataParallel raises unless find_unused_parameters=True; set "
        "requires_grad_(False) where that is meant"
    ]
