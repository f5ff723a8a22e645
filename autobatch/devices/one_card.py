"""Layers that are spread over several cards by hand: refused, as one card is probed.

Invariant: what is meant for another card is never counted on the one that is probed.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from autobatch.errors import WorkloadError
from autobatch.support.wording import given

__all__ = ["require_card", "require_one_card"]


def require_card(place: Any, own: int = 0) -> None:
    """Refuse a place, such as "cuda:1" or the index of a card, that is another card's.

    Args:
        place: a device, its name, or an index; anything else is left to PyTorch.
        own: the index of the card that is probed. The one that a launcher gives to this process
            will do as well.

    Raises:
        WorkloadError: it is on another card.
    """
    if isinstance(place, str) and place.startswith("cuda:") and place[5:].isdecimal():
        index: int | None = int(place[5:])
    elif isinstance(place, torch.device) and place.type == "cuda":
        index = place.index
    elif isinstance(place, int) and not isinstance(place, bool):
        index = place
    else:
        return
    if index not in (None, own, _local_rank()):
        raise _spread(f"the code uses cuda:{index}")


def require_one_card(model: nn.Module) -> None:
    """Refuse a model whose layers are on several cards, or will be by its `hf_device_map`.

    Raises:
        WorkloadError: they are.
    """
    cards = {str(p.device) for p in model.parameters() if p.device.type == "cuda"}
    for module in model.modules():
        places = getattr(module, "hf_device_map", None)
        if isinstance(places, dict):
            cards |= {f"cuda:{p}" if isinstance(p, int) else str(p) for p in places.values()}
    cards -= {"cpu", "disk", "meta"}
    if len(cards) > 1:
        raise _spread(f"the model's layers are on {' and '.join(sorted(cards))}")


def _local_rank() -> int | None:
    """Return the card that torchrun and its like give to this process."""
    rank = os.environ.get("LOCAL_RANK", "")
    return int(rank) if rank.isdecimal() else None


def _spread(what: str) -> WorkloadError:
    return WorkloadError(
        f"{what}, and one card is probed: layers that are spread over several cards by hand "
        "cannot be; put all of them on one card, or let the cards share the model with "
        f"{given('world_size', 2)} {given('sharding', 'fsdp')}"
    )
