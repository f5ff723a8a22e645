"""What a run says of training that would fail, grow, or train less than it seems to.

Invariant: each is one line that says what was seen, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from autobatch.errors import UsageError
from autobatch.support.units import format_bytes
from autobatch.support.wording import count, listed

__all__ = [
    "of_data_parallel",
    "refuse_several",
    "require_one_card",
    "too_large_unsharded",
    "without_gradients",
]

_NO_CARDS = frozenset(("cpu", "disk", "meta"))


def without_gradients(names: Sequence[str], trained: int) -> list[str]:
    """Say which of the trained parameters never got a gradient."""
    if not names:
        return []
    return [
        f"{count(len(names), 'parameter')} of the {trained:,} that are trained never got a "
        f"gradient, such as {names[0]}: its state and gradient are not in the account, and "
        "DistributedDataParallel raises unless find_unused_parameters=True; set "
        "requires_grad_(False) where that is meant"
    ]


def of_data_parallel(model: nn.Module) -> list[str]:
    """Say what it means that `nn.DataParallel` was taken off a model."""
    inner: Any = model
    while hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod
    if not isinstance(inner, nn.DataParallel):
        return []
    return [
        "nn.DataParallel was taken off: the plan is that of one GPU that runs each micro-batch "
        "alone; with it, a micro-batch is split over the GPUs, and the first also holds the "
        "outputs of all and the gathered gradients, so that it needs more than its share: use "
        "DistributedDataParallel with world_size="
    ]


def require_one_card(model: nn.Module) -> None:
    """Refuse a model whose layers are on several cards.

    Raises:
        UsageError: they are.
    """
    cards = {str(p.device) for p in model.parameters() if p.device.type == "cuda"}
    for module in model.modules():
        places = getattr(module, "hf_device_map", None)
        if isinstance(places, dict):
            cards |= {_card(place) for place in places.values()} - _NO_CARDS
    refuse_several(cards)


def refuse_several(cards: Iterable[str]) -> None:
    """Refuse work on several cards of one process.

    Raises:
        UsageError: more than one is named.
    """
    names = sorted(cards)
    if len(names) > 1:
        raise UsageError(
            f"the model is spread over {listed(names, 4)}, and a plan is that of one card: load it "
            "without device_map or .to() of several cards, or shard it (world_size=, "
            'sharding="fsdp")'
        )


def _card(place: Any) -> str:
    name = str(place)
    return f"cuda:{name}" if name.isdigit() else name


def too_large_unsharded(model_bytes: int, usable_bytes: int, card: str) -> list[str]:
    """Say that a model does not fit on one card before it is sharded."""
    if model_bytes <= usable_bytes:
        return []
    return [
        f"the whole model takes {format_bytes(model_bytes)}, more than the "
        f"{format_bytes(usable_bytes)} of one {card}: do not move it to the GPU before "
        "fully_shard; build it on the CPU or on meta, and let fully_shard move the shards"
    ]
